"""Checkpoints of a real run on 4 ranks: exact in the same layout, equal in another, whole or absent, refused with one line."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import random
import re
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_glmv.run_folder import checkpoint_sums
from megatron_glmv.run_folder.checkpoint_folder import CheckpointError, DiskError, complete_folders, latest
from megatron_glmv.run_folder.events import read_events
from megatron_glmv.training.state import TrainState
from tests.ranks import run_ranks, watch_ranks

SAVED = {"tensor": 2, "pipeline": 2}
OTHERS = {
    "pipeline 2 x virtual 2 x data 2": {"pipeline": 2, "virtual_pipeline": 2},
    "tensor 2 x data 2": {"tensor": 2},
    "data 4": {},
}
KINDS = ((True, "fp32"), (True, "bf16"), (False, "bf16"))
"""Distributed optimizer, precision."""
STATE = TrainState(step=2, consumed_rows=8, consumed_tokens=96, skipped_steps=1, bad_samples=3)


def report_of(rank: int, folder: str) -> dict[str, Any]:
    """Every scenario in one spawn; what it found is checked outside. Changing the layout is slow, hence the order."""
    from megatron_glmv.parallel import platform

    platform.activate()
    root = Path(folder)
    report: dict[str, Any] = {kind: save_and_resume(root / name_of(kind), kind) for kind in KINDS}
    for scenario in (dropout, asynchronous, refusals, damages, stale_disk, full_disk, refused_files, weights_only):
        report[scenario.__name__] = scenario(root / scenario.__name__)
    for name, layout in OTHERS.items():
        for kind in KINDS:
            report[kind][name] = resume_in(root / name_of(kind), kind, layout)[2]
    return report


def name_of(kind: tuple[bool, str]) -> str:
    return "-".join(map(str, kind))


def opened(run_folder: Path, layout: dict[str, int], **changes: Any) -> tuple[Any, Any]:
    from megatron_glmv.training.checkpoint import Checkpointer
    from tests.training.stock_gpt import Trainer, make_config

    build = {name: changes.pop(name) for name in ("seed", "dropout") if name in changes}
    trainer = Trainer.build(make_config(run_folder, layout, **changes), **build)
    return trainer, Checkpointer(trainer.config, trainer.chunks, trainer.optimizer)


def save_and_resume(run_folder: Path, kind: tuple[bool, str]) -> dict[str, Any]:
    """Save after two steps at TP2 x PP2; go on, and go on again from the checkpoint."""
    trainer, checkpointer = opened(run_folder, SAVED, distributed_optimizer=kind[0], dtype=kind[1])
    report: dict[str, Any] = {"empty": checkpointer.load_latest()}
    for step in range(2):
        trainer.step(step)
    checkpointer.save(STATE)
    weights = trainer.weights()
    report["unbroken"] = [trainer.step(step)[0] for step in range(2, 5)]
    report["state"], resumed_weights, report["same"] = resume_in(run_folder, kind, SAVED)
    report["same weights"] = all(torch.equal(a, b) for a, b in zip(weights, resumed_weights, strict=True))
    return report


def resume_in(run_folder: Path, kind: tuple[bool, str], layout: dict[str, int]) -> tuple[Any, list[torch.Tensor], list[float]]:
    """Load in a layout; returns the counters, this rank's tensors and the next losses."""
    trainer, checkpointer = opened(run_folder, layout, seed=99, distributed_optimizer=kind[0], dtype=kind[1])
    state = checkpointer.load_latest()
    return state, trainer.weights(), [trainer.step(step)[0] for step in range(2, 5)]


def dropout(run_folder: Path) -> dict[str, Any]:
    """A run with dropout: every generator must continue where it was."""
    trainer, checkpointer = opened(run_folder, SAVED, dropout=0.5)
    trainer.step(0)
    draw_numbers()
    checkpointer.save(TrainState(step=1))
    unbroken = [trainer.step(step)[0] for step in (1, 2)], draw_numbers()
    trainer, checkpointer = opened(run_folder, SAVED, dropout=0.5, seed=77)
    checkpointer.load_latest()
    resumed = [trainer.step(step)[0] for step in (1, 2)], draw_numbers()
    return {"unbroken": unbroken, "resumed": resumed}


def draw_numbers() -> tuple[float, ...]:
    """One number from each generator that is not Megatron's."""
    return torch.rand(1).item(), random.random(), np.random.rand()


def asynchronous(run_folder: Path) -> dict[str, Any]:
    """A background save holds the state of its moment, counts only when polled, and retires older ones."""
    # Without the distributed optimizer the tensors to write are the ones that the next step changes.
    changes = {"asynchronous": True, "keep": 1, "distributed_optimizer": False}
    trainer, checkpointer = opened(run_folder, SAVED, **changes)
    report: dict[str, Any] = {}
    trainer.step(0)
    disk_answers = delay_writes()
    checkpointer.save(TrainState(step=1))
    weights = trainer.weights()
    losses = [trainer.step(step)[0] for step in (1, 2)]
    checkpointer.poll()
    report["polled too early"] = checkpointer.take_reports()
    report["not yet"] = latest(run_folder)
    disk_answers.set()
    time.sleep(0.2)
    saves: list[Any] = []
    while not saves:
        checkpointer.poll()
        saves = checkpointer.take_reports()
    [report["save"]] = saves
    report["polled"] = list(complete_folders(run_folder))
    trainer, checkpointer = opened(run_folder, SAVED, seed=99, **changes)
    checkpointer.load_latest()
    report["same weights"] = all(torch.equal(a, b) for a, b in zip(weights, trainer.weights(), strict=True))
    report["same losses"] = losses == [trainer.step(step)[0] for step in (1, 2)]
    checkpointer.save(TrainState(step=3))
    trainer.step(3)
    checkpointer.save(TrainState(step=4))  # completes the one before
    report["second"] = list(complete_folders(run_folder))
    checkpointer.close()
    report["closed"] = list(complete_folders(run_folder))
    return report


def delay_writes() -> threading.Event:
    """Make the disk so slow that no write begins before the event is set."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    write, answers = FileSystemWriterAsync.write_preloaded_data, threading.Event()

    def wait_and_write(*args: Any, **named: Any) -> None:
        answers.wait()
        write(*args, **named)

    FileSystemWriterAsync.write_preloaded_data = staticmethod(wait_and_write)
    return answers


def weights_only(run_folder: Path) -> dict[str, Any]:
    """Another run, in another layout, precision and kind of optimizer, starts from the weights."""
    trainer, checkpointer = opened(run_folder, SAVED)
    trainer.step(0)
    add_statistics(checkpointer, _Touch(run_folder / "touched"))
    checkpointer.save(TrainState(step=1))
    expected = trainer.step(1)[0]
    report: dict[str, Any] = {"expected": expected}
    torch.distributed.barrier()
    (run_folder / "touched").unlink(missing_ok=True)  # torch looks at what it has written
    torch.distributed.barrier()
    for dtype, distributed in (("fp32", False), ("bf16", True), ("bf16", False)):
        trainer, checkpointer = opened(
            run_folder / "next", {"tensor": 2}, seed=99, dtype=dtype, distributed_optimizer=distributed
        )
        add_statistics(checkpointer, None)
        checkpointer.load_weights_only(run_folder)
        report[dtype, distributed] = trainer.step(1)[0]
        report["ran a pickle"] = (run_folder / "touched").exists()
        # The second step sees the optimizer's own copies of the weights.
        report[dtype, distributed, "next"] = trainer.step(2)[0]
    return report


class _Touch:
    """A pickle that makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self._path,)


def add_statistics(checkpointer: Any, value: object) -> None:
    """Have a model keep, and ask for, a pickled object, as Transformer Engine's layers do."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    plain, key = checkpointer._model_state_dict, "decoder.final_layernorm._extra_state"
    shard = ShardedObject(key, value, (1,), (0,), replica_id=torch.distributed.get_rank())
    checkpointer._model_state_dict = lambda: {name: {**part, key: shard} for name, part in plain().items()}


def message(action: Callable[[], object]) -> str:
    try:
        action()
    except CheckpointError as error:
        return str(error)
    except DiskError as error:
        return f"DiskError: {error}"
    return ""


def refusals(run_folder: Path) -> dict[str, str]:
    _, checkpointer = opened(run_folder, SAVED)
    checkpointer.save(TrainState(step=1))
    return {
        "architecture": message(opened(run_folder, SAVED, preset="glm-4.1v-9b")[1].load_latest),
        "precision": message(opened(run_folder, SAVED, dtype="bf16")[1].load_latest),
        "no resume": message(lambda: opened(run_folder, SAVED, resume=False)),
        "start from": message(lambda: opened(run_folder, SAVED)[1].load_weights_only(run_folder / "missing")),
    }


def damages(run_folder: Path) -> dict[str, Any]:
    """Newer checkpoints damaged in every way; the oldest is whole. Then that one, too."""
    trainer, checkpointer = opened(run_folder, SAVED, keep=9)
    trainer.step(0)
    checkpointer.save(TrainState(step=1))
    losses = [trainer.step(step)[0] for step in (1, 2)]
    for step in range(2, 2 + len(DAMAGES)):
        checkpointer.save(TrainState(step=step))
    if torch.distributed.get_rank() == 0:
        for damage, folder in zip(DAMAGES.values(), list(complete_folders(run_folder).values())[1:], strict=True):
            damage(folder)
    torch.distributed.barrier()
    trainer, checkpointer = opened(run_folder, SAVED, seed=99)
    state = checkpointer.load_latest()
    report = {"state": state, "same losses": losses == [trainer.step(step)[0] for step in (1, 2)]}
    report["left"] = sorted(entry.name for entry in (run_folder / "checkpoints").iterdir())
    report["events"] = [event["text"] for event in read_events(run_folder, ("damaged",))]
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        cut(min(complete_folders(run_folder)[1].glob("*.distcp")))
    torch.distributed.barrier()
    report["start from"] = message(lambda: checkpointer.load_weights_only(run_folder))
    report["none"] = message(checkpointer.load_latest)
    report["next start"] = message(opened(run_folder, SAVED)[1].load_latest)
    return report


def stale_disk(run_folder: Path) -> dict[str, Any]:
    """Rank 2's node answers otherwise than the others, or not at all; then the newest is of another version."""
    _, checkpointer = opened(run_folder, SAVED, keep=9)
    for step in (1, 2):
        checkpointer.save(TrainState(step=step))
    report: dict[str, Any] = {"host": socket.gethostname()}
    for number in (errno.ESTALE, errno.ENOENT):
        with read_fails(2, number):
            report[number] = message(checkpointer.load_latest)
    with list_fails(2):
        report["not listed"] = message(checkpointer.load_latest)
    report["state"] = checkpointer.load_latest()
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        manifest = complete_folders(run_folder)[2] / "meta.json"
        manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    torch.distributed.barrier()
    report["another version"] = message(checkpointer.load_latest)
    report["left"] = sorted(entry.name for entry in (run_folder / "checkpoints").iterdir())
    return report


@contextlib.contextmanager
def read_fails(rank: int, number: int) -> Iterator[None]:
    """One rank's files answer with an error when they are read."""
    sum_file = checkpoint_sums.sum_file

    def fail(path: Path, moved: object) -> tuple[int, int]:
        raise OSError(number, os.strerror(number), str(path))

    checkpoint_sums.sum_file = fail if torch.distributed.get_rank() == rank else sum_file
    yield
    checkpoint_sums.sum_file = sum_file


@contextlib.contextmanager
def list_fails(rank: int) -> Iterator[None]:
    """One rank's folders cannot be listed: it has no descriptor left."""
    iterdir = Path.iterdir

    def fail(self: Path) -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(self))

    Path.iterdir = fail if torch.distributed.get_rank() == rank else iterdir  # type: ignore[method-assign]
    yield
    Path.iterdir = iterdir  # type: ignore[method-assign]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "has [0-9,]+ bytes of": lambda folder: cut(max(folder.glob("*.distcp"))),
    "distcp is not what was written": lambda folder: flip(min(folder.glob("*.distcp"))),
    "distcp is missing": lambda folder: min(folder.glob("*.distcp")).unlink(),
    r"\.metadata is not what was written": lambda folder: flip(folder / ".metadata"),
    r"common\.pt is missing": lambda folder: (folder / "common.pt").unlink(),
    r"meta\.json: not JSON": lambda folder: cut(folder / "meta.json"),
    r"meta\.json: not what was written": lambda folder: (folder / "meta.json").write_text(
        (folder / "meta.json").read_text().replace('"dtype": "fp32"', '"dtype": "fp33"')
    ),
}
"""What the event says, and what is done to the checkpoint."""


def full_disk(run_folder: Path) -> dict[str, Any]:
    """One rank's writes fail half-way, as on a disk that fills up: the first time the run goes on, the second time it ends."""
    trainer, checkpointer = opened(run_folder, SAVED, max_failures=2)
    checkpointer.save(TrainState(step=1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if torch.distributed.get_rank() == 2:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    first = message(lambda: checkpointer.save(TrainState(step=2)))
    said = message(lambda: checkpointer.save(TrainState(step=3)))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    left = sorted(entry.name for entry in (run_folder / "checkpoints").iterdir())
    torch.distributed.barrier()
    checkpointer.save(TrainState(step=4))
    return {
        "first": first,
        "said": said,
        "left": left,
        "events": [event["text"] for event in read_events(run_folder, ("unsaved",))],
        "afterwards": list(complete_folders(run_folder)),
        "loss": trainer.step(2)[0],
    }


def refused_files(run_folder: Path) -> dict[str, Any]:
    """Rank 0's disk refuses what the loop adds, before it is written and then; and the removal of an old checkpoint."""
    _, checkpointer = opened(run_folder, SAVED, keep=1, asynchronous=True)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    extra = {"more.json": ["x" * 100] * 60_000}
    with file_limit(8 * 2**20):
        checkpointer.save(TrainState(step=1), extra)
    checkpointer.save(TrainState(step=2), extra)
    while not checkpointer._pending.write.is_written():
        time.sleep(0.01)
    torch.distributed.barrier()
    with file_limit(2**20):
        checkpointer.poll()
    left = [entry.name for entry in (run_folder / "checkpoints").iterdir()]
    torch.distributed.barrier()
    checkpointer.save(TrainState(step=3), extra)
    checkpointer.close()
    if torch.distributed.get_rank() == 0:
        Path.rename = refuse_removal  # type: ignore[method-assign]
    checkpointer.save(TrainState(step=4))
    checkpointer.close()
    Path.rename = RENAME  # type: ignore[method-assign]
    kept = list(complete_folders(run_folder))
    torch.distributed.barrier()
    checkpointer.save(TrainState(step=5))
    checkpointer.close()
    events = [event["text"] for event in read_events(run_folder, ("unsaved",))]
    return {"events": events, "left": left, "kept": kept, "at last": list(complete_folders(run_folder))}


RENAME = Path.rename


def refuse_removal(self: Path, target: Any) -> Path:
    if str(target).endswith(".removing"):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(self))
    return RENAME(self, target)


@contextlib.contextmanager
def file_limit(size_bytes: int) -> Iterator[None]:
    """No file of rank 0 may become larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if torch.distributed.get_rank() == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(report_of, 4, str(tmp_path_factory.mktemp("runs")), timeout_s=400)


@pytest.mark.parametrize(("distributed", "dtype"), KINDS)
def test_the_same_layout_continues_bit_for_bit(reports: list[dict[str, Any]], distributed: bool, dtype: str) -> None:
    for rank in reports:
        found = rank[distributed, dtype]
        assert found["empty"] is None
        assert found["state"] == STATE
        assert found["same weights"]
        assert found["same"] == found["unbroken"]


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(("distributed", "dtype"), KINDS)
def test_another_layout_continues_with_the_same_losses(
    reports: list[dict[str, Any]], distributed: bool, dtype: str, name: str
) -> None:
    """fp32: only the order of sums differs. bf16: so does the rounding of every activation."""
    found = reports[0][distributed, dtype]
    tolerance = 1e-5 if dtype == "fp32" else 1e-2
    assert found[name] == pytest.approx(found["unbroken"], abs=tolerance)


def test_every_random_generator_continues(reports: list[dict[str, Any]]) -> None:
    for rank in reports:
        assert rank["dropout"]["resumed"] == rank["dropout"]["unbroken"]


def test_a_background_save_holds_its_moment(reports: list[dict[str, Any]]) -> None:
    for rank in reports:
        found = rank["asynchronous"]
        assert found["not yet"] is None and not found["polled too early"]
        assert found["polled"] == [1]
        assert found["save"].step == 1 and 0 < found["save"].stall_s < found["save"].seconds - 0.2, "writing is no stall"
        assert found["same weights"] and found["same losses"]
        assert found["second"] == [3], "the newer one is complete, so keep=1 retires the older one"
        assert found["closed"] == [4]


def test_weights_start_another_run(reports: list[dict[str, Any]]) -> None:
    found = reports[0]["weights_only"]
    assert not found.pop("ran a pickle"), "of another run's FP8 statistics"
    assert found["fp32", False] == pytest.approx(found["expected"], abs=1e-5)
    for distributed in (True, False):
        assert found["bf16", distributed] == pytest.approx(found["expected"], abs=2e-2)
        assert found["bf16", distributed, "next"] == pytest.approx(found["fp32", False, "next"], abs=2e-2)


def test_unusable_checkpoints_get_one_line(reports: list[dict[str, Any]]) -> None:
    for rank in reports:
        said = rank["refusals"]
        assert all(line and "\n" not in line for line in said.values()), said
        assert "text.num_layers is" in said["architecture"] and "step_00000001" in said["architecture"]
        assert "precision.dtype was fp32" in said["precision"]
        assert "checkpoint.resume" in said["no resume"]
        assert "missing: holds no complete checkpoint" in said["start from"]


def test_the_newest_whole_checkpoint_is_taken_and_damaged_ones_stay(reports: list[dict[str, Any]]) -> None:
    for rank in reports:
        found = rank["damages"]
        assert found["state"] == TrainState(step=1) and found["same losses"]
        assert found["left"] == ["step_00000001", *(f"step_{step:08d}.damaged" for step in range(2, 2 + len(DAMAGES)))]
        for said, expected in zip(reversed(found["events"]), DAMAGES, strict=True):
            assert re.search(expected, said) and "set aside as step_" in said and "\n" not in said
        assert "step_00000001: damaged (" in found["start from"]
        for none in (found["none"], found["next start"]):
            assert "no checkpoint of this run is whole" in none, "it does not begin anew by itself"


def test_a_disk_that_does_not_answer_one_rank_condemns_no_checkpoint(reports: list[dict[str, Any]]) -> None:
    for rank in reports:
        found = rank["stale_disk"]
        for said in (found[errno.ESTALE], found[errno.ENOENT], found["not listed"]):
            assert said.startswith(f"DiskError: rank 2 on {found['host']}: ") and "\n" not in said
        assert "[Errno 116] Stale file handle: '" in found[errno.ESTALE] and "/step_00000002/" in found[errno.ESTALE]
        assert "is missing as this rank reads it, and not as rank 0 does" in found[errno.ENOENT]
        assert "[Errno 24] Too many open files" in found["not listed"]
        assert found["state"] == TrainState(step=2)
        assert "not a checkpoint manifest of format 1" in found["another version"]
        assert "DiskError" not in found["another version"], "no start repairs that"
        assert found["left"] == ["step_00000001", "step_00000002"]


def test_a_full_disk_loses_nothing(reports: list[dict[str, Any]]) -> None:
    for rank in reports:
        found = rank["full_disk"]
        assert not found["first"]
        [event] = found["events"]
        assert "step_00000002: could not be written" in event and "(failure 1 of 2 in a row)" in event
        assert "step_00000003: could not be written" in found["said"]
        assert "older checkpoints are untouched" in found["said"]
        assert found["left"] == ["step_00000001"], "what was written of the others gives its room back"
        assert found["afterwards"] == [1, 4]
    assert "File too large" in reports[0]["full_disk"]["said"], "the rank that gathers the results knows the reason"


def test_a_disk_that_refuses_one_ranks_files_ends_no_run(reports: list[dict[str, Any]]) -> None:
    for rank in reports:
        found = rank["refused_files"]
        unmade, unwritten, unremoved = found["events"]
        assert "step_00000001.partial: cannot be created (File too large)" in unmade, "room for the file is asked for first"
        assert "step_00000002/more.json: could not be written ([Errno 27] File too large" in unwritten
        assert "(failure 2 of 3 in a row)" in unwritten
        assert found["left"] == []
        assert "step_00000003: cannot be removed (Permission denied)" in unremoved and "failure" not in unremoved
        assert found["kept"] == [3, 4] and found["at last"] == [5]


def save_until_killed(rank: int, folder: str, delay_s: float) -> None:
    """Save after every step, in the background, until the process is killed at a moment that the loop does not choose."""
    from megatron_glmv.parallel import platform

    platform.activate()
    trainer, checkpointer = opened(Path(folder), {}, asynchronous=True, keep=3)
    state = checkpointer.load_latest() or TrainState()
    threading.Thread(target=kill_after_the_next_save, args=(Path(folder), state.step, delay_s)).start()
    while True:
        trainer.step(state.step)
        state = dataclasses.replace(state, step=state.step + 1)
        checkpointer.poll()
        checkpointer.save(state)


def kill_after_the_next_save(run_folder: Path, step: int, delay_s: float) -> None:
    while max(complete_folders(run_folder), default=0) <= step:
        time.sleep(0.01)
    time.sleep(delay_s)
    os.kill(os.getpid(), signal.SIGKILL)


def resume(rank: int, folder: str) -> tuple[int, float, list[str]]:
    from megatron_glmv.parallel import platform

    platform.activate()
    trainer, checkpointer = opened(Path(folder), {})
    state = checkpointer.load_latest()
    assert state is not None
    names = [entry.name for entry in (Path(folder) / "checkpoints").iterdir()]
    return state.step, trainer.step(state.step)[0], names


def test_a_killed_save_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    steps = []
    for delay_s in (0.17, 0.06):
        assert watch_ranks(save_until_killed, 1, str(tmp_path), delay_s)[0].exit_code == -signal.SIGKILL
        steps.append(max(complete_folders(tmp_path)))
    assert 0 < steps[0] < steps[1]
    step, loss, names = run_ranks(resume, 1, str(tmp_path))[0]
    assert step == steps[1] and 3 < loss < 5
    assert not [name for name in names if name.endswith((".partial", ".removing"))]
