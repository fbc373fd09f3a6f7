"""How prompts are graded offline: the parts of a stage of reinforcement learning that answers and their rewards depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_glmv.config.base import Config, ConfigError, load_tree, merge, validate
from megatron_glmv.config.rewards import RewardsConfig
from megatron_glmv.config.rl import ForceAnswerConfig, GradingConfig, SamplingConfig


class GradeConfig(Config):
    """Sampling, rewards and rules of difficulty; `sampling.group_size` is the number of answers of each model."""

    sampling: SamplingConfig = SamplingConfig()
    force_answer: ForceAnswerConfig = ForceAnswerConfig()
    rewards: RewardsConfig = RewardsConfig()
    grading: GradingConfig = GradingConfig()


def load_grade(items: Sequence[str], changes: Mapping[str, Any]) -> GradeConfig:
    """The settings of a command line.

    Args:
        items: YAML files and `a.b=value` overrides. A file is one for `glmv rl`, whose other parts are left aside, or one for
            `glmv reward`, which may also hold sampling, force_answer and grading.
        changes: a tree that wins over both.

    Raises:
        ConfigError: one line naming the key at fault.
    """
    overrides = [item for item in items if "=" in item]
    files = [item for item in items if item not in overrides]
    tree = load_tree(files, overrides)
    parts = {name: tree.pop(name) for name in GradeConfig.model_fields if name in tree}
    if "prompts" not in tree and tree:
        if "rewards" in parts:
            raise ConfigError(f"{', '.join(items)}: {next(iter(tree))} stands beside rewards; put it under rewards")
        parts["rewards"] = tree
    try:
        return validate(GradeConfig, merge(parts, changes), where=", ".join(items))
    except ConfigError as error:
        raise ConfigError(str(error).replace("glmv check --schema", "glmv rl --schema")) from None
