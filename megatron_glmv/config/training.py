"""The root of a training run, and what it shares with that of reinforcement learning: a file is one stage."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from megatron_glmv.config.base import Config, ConfigError
from megatron_glmv.config.data import DataConfig
from megatron_glmv.config.fp8 import check_fp8, row_multiple
from megatron_glmv.config.linears import adapted_layers
from megatron_glmv.config.model import ModelConfig
from megatron_glmv.config.parallel import ParallelConfig, PrecisionConfig, RecomputeConfig


class OptimizerConfig(Config):
    """AdamW and its schedule. None of these values is in the paper, except where a stage file says so."""

    lr: float = Field(default=1e-4, ge=0)
    """Peak learning rate of the decoder."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the decay, for the decoder; other parts keep the same ratio to their peak."""
    vision_lr: float | None = Field(default=None, ge=0)
    """Peak learning rate of the vision tower; null: lr."""
    merger_lr: float | None = Field(default=None, ge=0)
    """Peak learning rate of the merger; null: lr."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Decay after the warm-up; wsd holds the peak and decays linearly over the last decay_steps."""
    warmup_steps: int = Field(default=0, ge=0)
    decay_steps: int | None = Field(default=None, ge=1)
    """Steps of the decay; null: all steps after the warm-up (wsd: a tenth of the run)."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled; not applied to norms and biases."""
    clip_grad_norm: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 does not clip."""


class CheckpointConfig(Config):
    """Saving and resuming."""

    every_steps: int = Field(default=1000, ge=1)
    keep: int = Field(default=2, ge=1)
    """Newest complete checkpoints that stay on disk."""
    keep_every_steps: int | None = Field(default=None, ge=1)
    """Checkpoints at multiples of this step are never removed."""
    asynchronous: bool = False
    """Write in the background while training goes on."""
    max_failures: int = Field(default=3, ge=1)
    """The run ends when so many saves in a row have failed; before that, it warns, goes on and tries again at the next."""
    verify: bool = True
    """Before a resume, read every file once and compare checksums, not sizes alone."""
    resume: bool = True
    """Continue from the newest complete checkpoint of the run folder, if there is one."""
    start_from: Path | None = None
    """Without a checkpoint of its own, start from the weights of this one (not its optimizer, step or data position)."""
    local_folder: Path | None = None
    """On every node's own disk or in its memory, for copies between the shared checkpoints; a restart on the same nodes in the
    same layout goes on from them where they are newer. null: none."""
    local_every_steps: int = Field(default=0, ge=0)
    """Steps between local copies, of which the newest two stay; training stands still while one is written. 0: none."""

    @model_validator(mode="after")
    def _copies_have_a_place(self) -> Self:
        if self.local_every_steps and self.local_folder is None:
            raise ValueError("local_every_steps: needs local_folder, on a disk of the node's own")
        return self


class WandbConfig(Config):
    """A run on Weights & Biases; key and server come from its own environment variables (WANDB_API_KEY, WANDB_BASE_URL)."""

    project: str = Field(min_length=1)
    entity: str | None = None
    """Team; null: the account's own."""
    name: str | None = None
    """Of the run; null: the name of run_folder."""
    mode: Literal["online", "offline"] = "online"
    """offline writes to run_folder/wandb, for `wandb sync` on a machine with a network."""


class MetricsConfig(Config):
    """What is reported and where."""

    every_steps: int = Field(default=1, ge=1)
    """Steps between lines of the log and points of TensorBoard."""
    tensorboard: bool = True
    ranks_every_steps: int = Field(default=100, ge=0)
    """Steps between comparisons of all ranks, which name the slowest; 0: none."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """Dense peak of one device in the training precision; null: known for H100/H200/A100, else no MFU."""
    hardware: Path | None = None
    """The FILE.yaml of `glmv plan --hardware`, for devices other than H100, H200 and A100: TensorBoard then shows what the plan
    expects beside what is measured, as a run named planned."""
    observe_every_steps: int = Field(default=50, ge=0)
    """Steps between closer looks: norms and histograms of each part's weights and gradients, memory and idle time of each
    pipeline stage; 0: never. The step that is looked at is slower by its synchronisations."""
    wandb: WandbConfig | None = None
    """Show TensorBoard's curves on Weights & Biases too; needs its package, and tensorboard on."""

    @model_validator(mode="after")
    def _wandb_follows_tensorboard(self) -> Self:
        if self.wandb is not None and not self.tensorboard:
            raise ValueError("wandb: it shows what TensorBoard's files hold; set tensorboard to true")
        return self


class ProfileConfig(Config):
    """A trace of chosen steps by torch's profiler, for Perfetto, with a table of the costliest operations."""

    first_step: int = Field(ge=1)
    """First step of the trace, counted from 1; a few after the start, when caches and allocators have settled."""
    steps: int = Field(default=2, ge=1)
    """Steps of the trace."""
    ranks: tuple[int, ...] = (0,)
    """Ranks that write one."""
    memory: bool = False
    """Also record every allocation; makes large files."""
    stacks: bool = False
    """Also record the Python lines that operations came from; makes large files."""


GuardPolicy = Literal["skip", "rollback", "stop"]
"""skip: go on with the next rows. rollback: return to the last checkpoint, and leave the rows out. stop: end the run."""


class GuardConfig(Config):
    """What is done about a step that goes wrong; its update is never applied."""

    non_finite: GuardPolicy = "skip"
    """When a gradient is not finite on any rank."""
    spike: Literal["off", "skip", "rollback", "stop"] = "off"
    """When loss or gradient norm are far above those of the steps before; off: not looked at."""
    loss_deviations: float = Field(default=8.0, gt=0)
    """A loss is a spike so many standard deviations (by the median deviation) above the window's median."""
    norm_factor: float = Field(default=20.0, gt=1)
    """A gradient norm is a spike at so many times the window's median."""
    window: int = Field(default=100, ge=8)
    """Applied steps that tell what is usual; before there are as many, nothing is a spike."""
    rollback_batches: int = Field(default=1, ge=1)
    """Global batches that a rollback leaves out: that of the step, and those before it."""
    max_in_a_row: int = Field(default=10, ge=1)
    """The run ends at more refused steps in a row, or more rollbacks to the same checkpoint."""


class EvaluationConfig(Config):
    """The loss on held-out rows."""

    every_steps: int = Field(default=0, ge=0)
    """Steps between evaluations; 0: only at the end. Needs data.eval_sources."""
    rows: int = Field(default=64, ge=1)
    """Rows of one evaluation; the same ones each time."""


class StageConfig(Config):
    """What every stage has, whatever its rows and its loss."""

    run_folder: Path
    """Everything the run writes: checkpoints, logs, TensorBoard, the resolved configuration."""
    steps: int = Field(ge=1)
    """Optimizer updates of the stage; in reinforcement learning its iterations."""
    seed: int = Field(default=1234, ge=0)
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    recompute: RecomputeConfig = RecomputeConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    profile: ProfileConfig | None = None
    """Trace some steps; null: none."""
    megatron: dict[str, Any] = Field(default_factory=dict)
    """Fields of Megatron's TransformerConfig passed through to the decoder; checked against its dataclass at start."""

    length_key: ClassVar[str]
    """Where `sequence_length` stands in the tree."""

    @property
    def sequence_length(self) -> int:
        """Tokens of one packed row."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _warms_up_within(self) -> Self:
        if self.optimizer.warmup_steps > self.steps:
            raise ValueError("optimizer.warmup_steps: longer than the run")
        return self

    def check(self) -> None:
        """Everything that can be checked without a device, beyond single fields.

        Raises:
            ConfigError: one line with the key at fault and what to do.
        """
        shape = self.model.shape
        self.parallel.check_model(shape)
        if self.model.lora is not None:
            adapted = adapted_layers(self.model.lora, shape)
            if self.parallel.vision == "images" and any("visual" in name for name in adapted):
                raise ConfigError(
                    "parallel.vision: images cannot be had with adapters in the vision tower or the merger; leave them out of "
                    "model.lora, or use tensor"
                )
        length, layout = self.sequence_length, self.parallel
        unit = layout.row_alignment * (layout.tensor if layout.sequence_parallel else 1)
        unit = math.lcm(unit, row_multiple(self.precision, layout))
        if length % unit:
            fp8 = f" with fp8_text {self.precision.fp8_text}" if self.precision.fp8_text != "off" else ""
            raise ConfigError(
                f"{self.length_key}: {length} is not a multiple of {unit}, which context {layout.context} and tensor "
                f"{layout.tensor}{fp8} need; use {length // unit * unit or unit}"
            )
        check_fp8(shape, layout, self.precision)
        if length > shape.text.max_positions:
            raise ConfigError(f"{self.length_key}: {length} is longer than the model's {shape.text.max_positions} positions")

    def data_parallel(self, num_ranks: int) -> int:
        """Data-parallel size on `num_ranks` ranks.

        Raises:
            ConfigError: the ranks are not a multiple of one replica.
        """
        replica = self.parallel.model_ranks
        if num_ranks % replica:
            raise ConfigError(
                f"parallel: one replica takes tensor {self.parallel.tensor} x pipeline {self.parallel.pipeline} x context "
                f"{self.parallel.context} = {replica} ranks; {num_ranks} ranks are not a multiple of it"
            )
        return num_ranks // replica


class TrainConfig(StageConfig):
    """One stage of training: pre-training, long-context training or SFT."""

    global_batch_rows: int = Field(ge=1)
    """Packed rows of one step, over all data-parallel ranks. A micro-batch is always one row."""
    data: DataConfig
    guard: GuardConfig = GuardConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    length_key: ClassVar[str] = "data.sequence_length"

    @property
    def sequence_length(self) -> int:
        """Tokens of one packed row."""
        return self.data.sequence_length

    @model_validator(mode="after")
    def _has_held_out_rows(self) -> TrainConfig:
        if self.evaluation.every_steps and not self.data.eval_sources:
            raise ValueError("evaluation.every_steps: needs data.eval_sources")
        return self

    def check(self) -> None:
        """As every stage, and that the schedule can deal the batch.

        Raises:
            ConfigError: one line with the key at fault and what to do.
        """
        super().check()
        if self.parallel.virtual_pipeline > 1 and self.global_batch_rows % self.parallel.pipeline:
            raise ConfigError(
                f"global_batch_rows: the interleaved schedule needs a multiple of pipeline {self.parallel.pipeline} on every "
                "replica"
            )

    def data_parallel(self, num_ranks: int) -> int:
        """Data-parallel size on `num_ranks` ranks.

        Raises:
            ConfigError: the ranks are not a multiple of one replica, or the batch does not divide.
        """
        data = super().data_parallel(num_ranks)
        if self.global_batch_rows % data:
            raise ConfigError(f"global_batch_rows: {self.global_batch_rows} rows cannot be dealt to {data} data-parallel ranks")
        rows = self.global_batch_rows // data
        if self.parallel.virtual_pipeline > 1 and rows % self.parallel.pipeline:
            raise ConfigError(
                f"global_batch_rows: {rows} rows a replica are not a multiple of pipeline {self.parallel.pipeline}, "
                "which the interleaved schedule needs"
            )
        return data
