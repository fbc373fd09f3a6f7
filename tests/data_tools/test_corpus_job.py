"""A job is killed and continued, divided into parts and stopped by faults; its output never depends on any of it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from data_tools import cli
from data_tools.corpus import locks
from tests.data_tools.fuzzed import contents, jpeg, pair

NUM, CHUNK = 360, 12


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 chunks; keys repeat within chunks and across them, also three times, so that chunks are written twice."""
    folder = tmp_path_factory.mktemp("corpus")
    for seed in range(40):
        (folder / f"{seed}.jpg").write_bytes(jpeg(seed, 300, 400))
    with (folder / "a.jsonl").open("w") as file:
        for number in range(NUM):
            key = {40: 3, 41: 41, 43: 41, 200: 3, 201: 3, 202: 41}.get(number, number)
            file.write(json.dumps(pair(f"s{key}", f"{number % 40}.jpg", f"drawing of a thing, number {number}")) + "\n")
    (folder / "concepts.txt").write_text("drawing\nnumber 7\nthing\n")
    return folder


def command(tool: str, corpus: Path, out: Path, *more: str) -> list[str]:
    concepts = ["--concepts", str(corpus / "concepts.txt"), "--cap", "60"]
    own = {"filter": [], "dedupe": ["--match", "both"], "balance": concepts}[tool]
    return [tool, str(corpus / "a.jsonl"), str(out), "--chunk", str(CHUNK), *own, *more]


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "data_tools", *arguments], env=environment,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip


def kill_in(process: subprocess.Popen[bytes], folder: Path, num_done: int) -> None:
    """Kill a command, not its workers, when `num_done` chunks of a pass are done; its workers must end by themselves."""
    deadline = time.monotonic() + 60
    while len(list(folder.glob("*.done.json"))) < num_done:
        assert process.poll() is None, "it finished before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive


@pytest.mark.parametrize("tool", ["filter", "dedupe"])
def test_killed_twice_and_continued_gives_the_same_bytes(tool: str, corpus: Path, tmp_path: Path) -> None:
    assert cli.main(command(tool, corpus, tmp_path / "once", "--workers", "1")) == 0
    expected = contents(tmp_path / "once")
    report = expected["report.json"]
    assert report["samples"] == NUM
    assert report["dropped"]["key_duplicate"] == 5
    out = tmp_path / "killed"
    partial = tmp_path / "killed.partial"
    more = ["--form", "jsonl", "--workers", "2"]
    first = "write" if tool == "filter" else "scan"
    kill_in(start(command(tool, corpus, out, *more)), partial / first, 4)
    assert not out.exists()
    done = {path.name: path.stat().st_mtime_ns for path in (partial / first).glob("*.done.json")}
    assert 4 <= len(done) < NUM // CHUNK
    (partial / "media").mkdir(exist_ok=True)  # what a kill leaves of a chunk that is not done
    broken = partial / f"samples-{NUM // CHUNK - 1:06d}.jsonl"
    broken.write_text('{"half')
    kill_in(start(command(tool, corpus, out, *more)), partial / "write", 9)
    after = {path.name: path.stat().st_mtime_ns for path in (partial / first).glob("*.done.json")}
    assert {name: after[name] for name in done} == done
    assert cli.main(command(tool, corpus, out, "--workers", "1")) == 0
    assert contents(out) == expected
    assert not partial.exists()
    assert cli.main(command(tool, corpus, out, "--workers", "1")) == 0
    assert contents(out) == expected


@pytest.mark.parametrize("tool", ["filter", "dedupe", "balance"])
def test_parts_make_what_one_run_makes(tool: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command(tool, corpus, tmp_path / "once", "--workers", "1")) == 0
    capsys.readouterr()
    assert contents(tmp_path / "once")["report.json"]["dropped"]["key_duplicate"] == 5
    lines = [line for path in (tmp_path / "once").glob("samples*") for line in path.read_text().splitlines()]
    assert len({json.loads(line)["id"] for line in lines}) == len(lines) > 0
    num_passes = 1 if tool == "filter" else 2
    reports = []
    for part in ["0/2", "1/2"] * num_passes:
        assert cli.main(command(tool, corpus, tmp_path / "parts", "--part", part, "--workers", "1")) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert not reports[0]["complete"]
    assert (tmp_path / "parts").exists()
    assert contents(tmp_path / "parts") == contents(tmp_path / "once")
    assert any(report["complete"] for report in reports)


def test_parts_that_run_at_once_wait_for_each_other(corpus: Path, tmp_path: Path) -> None:
    assert cli.main(command("dedupe", corpus, tmp_path / "once", "--workers", "1")) == 0
    more = ["--workers", "1", "--wait", "60", "--part"]
    parts = [start(command("dedupe", corpus, tmp_path / "parts", *more, f"{i}/3")) for i in range(3)]
    assert [part.wait(timeout=90) for part in parts] == [0, 0, 0]
    assert contents(tmp_path / "parts") == contents(tmp_path / "once")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["once", "parts"]


@pytest.mark.parametrize("tool", ["filter", "dedupe"])
def test_a_job_that_runs_is_not_started_again_and_a_kill_lets_go(
    tool: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command(tool, corpus, tmp_path / "once", "--workers", "1")) == 0
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    running = start(command(tool, corpus, out, "--workers", "1"))
    while not list(partial.glob("*/*.done.json")):
        assert running.poll() is None
        time.sleep(0.002)
    running.send_signal(signal.SIGSTOP)
    capsys.readouterr()
    assert cli.main(command(tool, corpus, out, "--workers", "1")) == 1
    error = capsys.readouterr().err.splitlines()
    holder = f"process {running.pid} on {socket.gethostname()}"
    assert error == [f"glmv-data {tool}: {partial}: this job is being done by {holder}; wait until that ends or stop it, "
                     "then run the command again"]  # fmt: skip
    running.kill()
    running.wait()
    assert cli.main(command(tool, corpus, out, "--workers", "1")) == 0
    assert contents(out) == contents(tmp_path / "once")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["once", "out"]


def test_a_part_that_runs_keeps_its_like_out_and_no_other(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first thing that a process leaves is its lock, and a folder with nothing else is no folder of another tool."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    partial.mkdir()
    with locks.claim(partial / "part-1-of-2.lock", "part 1/2"):
        assert cli.main(command("filter", corpus, out, "--part", "0/2")) == 0
        assert cli.main(command("filter", corpus, out, "--part", "1/2")) == 1
        assert f"{partial}: part 1/2 is being done by process {os.getpid()}" in capsys.readouterr().err.splitlines()[-1]
        assert cli.main(command("filter", corpus, out, "--part", "0/3")) == 1
        assert f"{partial}: part 1/2 is being done by" in capsys.readouterr().err.splitlines()[-1]
    assert cli.main(command("filter", corpus, out, "--part", "1/2")) == 0
    assert sorted(path.name for path in out.iterdir()) == sorted(["dropped.jsonl", "media", "report.json", *(
        f"samples-{number:06d}.jsonl" for number in range(NUM // CHUNK))])  # fmt: skip


def test_too_many_faults_stop_the_job_and_a_larger_share_continues(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.jsonl"
    lines = [json.dumps(pair(f"s{number}", "gone.jpg" if number % 10 == 0 else f"{number % 40}.jpg")) for number in range(60)]
    path.write_text("\n".join(lines))
    arguments = ["filter", str(path), str(tmp_path / "out"), "--media-root", str(corpus), "--workers", "1", "--chunk", "20"]
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "6 of 60 samples have faults, more than --max-bad-share 0.05 (6 media_missing)" in error
    assert not (tmp_path / "out").exists()
    markers = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.partial" / "write").glob("*.done.json")}
    assert len(markers) == 3
    assert cli.main([*arguments, "--max-bad-share", "0.2"]) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["kept"] == 54


def test_a_folder_of_other_settings_is_refused(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command("filter", corpus, tmp_path / "out", "--workers", "1")) == 0
    assert cli.main(command("filter", corpus, tmp_path / "out", "--min-side", "99")) == 1
    assert "out: made with other rules; remove it" in capsys.readouterr().err
    assert cli.main(command("dedupe", corpus, tmp_path / "out")) == 1
    assert "made by 'filter'" in capsys.readouterr().err
    (tmp_path / "else.partial").mkdir()
    (tmp_path / "else.partial" / "thesis.txt").write_text("precious")
    assert cli.main(command("filter", corpus, tmp_path / "else")) == 1
    assert "exists and is no folder of this tool" in capsys.readouterr().err
    assert (tmp_path / "else.partial" / "thesis.txt").read_text() == "precious"
