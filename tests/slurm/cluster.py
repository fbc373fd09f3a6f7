"""A SLURM of its own for tests: munged, slurmctld and two slurmd on this machine, in a temporary folder, on free ports.

Everything is this cluster's own: key, socket, configuration, state, spool. A munge or a SLURM of the machine is never asked and
never disturbed; what is ended is ended by process id, and only what was started here or descends from it. The node names n1 and
n2 need not resolve: SLURM reaches both by NodeAddr, and jobs learn their addresses from it.

Source: slurm.conf(5), munged(8); the settings that make failures quick are explained where they stand.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from tests.stages import REPOSITORY

NODES = ("n1", "n2")

CONFIGURATION = """\
ClusterName=glmv
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for as long as credentials live, by default 120 s.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TaskProlog={folder}/task_prolog
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
# Failures as on any cluster, in seconds instead of minutes.
SlurmdTimeout=8
SlurmctldTimeout=10
MessageTimeout=8
TCPTimeout=2
KillWait=10
UnkillableStepTimeout=15
CompleteWait=0
MinJobAge=300
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120 OverSubscribe=NO
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF OverSubscribe=NO
"""


class ClusterError(AssertionError):
    """A daemon did not start, or the cluster did not reach a state in time."""


class Cluster:
    """A running cluster of two nodes.

    Args:
        folder: for everything; removed by the caller. Short: a socket's path has at most 107 characters.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "SRUN_"))},
            "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin",
            "SLURM_CONF": str(folder / "slurm.conf"),
        }

    def start(self) -> None:
        """Start all daemons and wait until both nodes are idle.

        Raises:
            ClusterError: a daemon ended, or a node is not idle after a minute; with the end of the logs.
        """
        self._configure()
        munge = self.folder / "munge"
        self._run("mungekey", "--create", f"--keyfile={munge / 'key'}")
        own = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        # --force: a temporary folder that others may not enter is only a warning; this user alone asks.
        self._spawn("munged", "munged", "--foreground", "--force", *(f"--{name}={munge / file}" for name, file in own.items()))
        self._wait("munged's socket", (munge / "socket").exists, 20)
        self._spawn("slurmctld", "slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        self.wait_idle()

    def _configure(self) -> None:
        for name in ("munge", "state", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir(mode=0o700)
        ports = _free_ports(1 + len(NODES))
        text = CONFIGURATION.format(host=socket.gethostname(), folder=self.folder, user=getpass.getuser(), ctld_port=ports[0])
        for node, port in zip(NODES, ports[1:], strict=True):
            address = f"NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port}"
            text += f"NodeName={node} {address} CPUs=4 RealMemory=1000 State=UNKNOWN\n"
        (self.folder / "slurm.conf").write_text(text, encoding="utf-8")
        self.set_task_environment({})

    def set_task_environment(self, of_nodes: Mapping[str, Mapping[str, str]]) -> None:
        """Let every task that starts on a node from now on see these variables: NODE -> name -> value."""
        lines = ["#!/bin/sh"]
        for node, variables in of_nodes.items():
            for name, value in variables.items():
                lines.append(f'[ "$SLURMD_NODENAME" = {node} ] && echo "export {name}={value}"')
        prolog = self.folder / "task_prolog"
        prolog.write_text("\n".join([*lines, "exit 0", ""]), encoding="utf-8")
        prolog.chmod(0o755)

    def start_node(self, node: str) -> None:
        """Start the slurmd of a node."""
        self._spawn(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """End a node as a power cut does: its slurmd and everything that it runs, at once, by process id."""
        daemon = self._daemons.pop(node)
        kill_tree([daemon.pid, *self._steps_of(node)])
        daemon.wait()

    def return_node(self, node: str) -> None:
        """Bring a killed node back."""
        self.start_node(node)
        self._wait(f"{node} to answer", lambda: self.state(node) in ("idle", "mixed", "allocated"), 60)

    @contextlib.contextmanager
    def slowed(self, node: str, share: float) -> Iterator[None]:
        """Let what jobs run on a node proceed for this share of the time only: stopped and continued, ten times a second."""
        over = threading.Event()

        def send(number: signal.Signals) -> None:
            for process in descendants(self._steps_of(node)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, number)

        def slow_down() -> None:
            while not over.wait(0.1 * share):
                send(signal.SIGSTOP)
                over.wait(0.1 * (1 - share))
                send(signal.SIGCONT)

        thread = threading.Thread(target=slow_down)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            send(signal.SIGCONT)

    def state(self, node: str) -> str:
        """State of a node as sinfo prints it; a * means that it does not answer."""
        return self._run("sinfo", "-h", "-N", "-n", node, "-p", "main", "-o", "%T").strip()

    def wait_idle(self, timeout_s: float = 60) -> None:
        """Wait until both nodes are idle."""
        self._wait("both nodes to be idle", lambda: all(self.state(node) == "idle" for node in NODES), timeout_s)

    def submit(self, *words: str, folder: Path, environment: Mapping[str, str] | None = None) -> str:
        """Run sbatch in `folder`; returns the job's id."""
        return self._run("sbatch", "--parsable", *words, cwd=folder, environment=environment).strip()

    def submit_stages(self, *words: str, folder: Path, environment: Mapping[str, str]) -> list[str]:
        """Run examples/slurm/stages.sh in `folder`; returns the jobs' ids."""
        script = str(REPOSITORY / "examples" / "slurm" / "stages.sh")
        output = self._run("bash", script, *words, cwd=folder, environment=environment)
        return [line.split()[0] for line in output.splitlines()]

    def run_everywhere(self, *words: str, environment: Mapping[str, str], timeout_s: float) -> str:
        """Run a command once on both nodes, at the same time."""
        step = ("srun", "--nodes=2", "--ntasks-per-node=1", "--cpu-bind=none", "--wait=0", *words)
        return self._run(*step, environment=environment, timeout_s=timeout_s)

    def job(self, job: str) -> dict[str, str]:
        """What scontrol shows of a job: key -> value; empty once SLURM has forgotten it."""
        text = self._run("scontrol", "show", "job", "-o", job, check=False)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait_job(self, job: str, states: Iterable[str], timeout_s: float, explain: Callable[[], str] = str) -> dict[str, str]:
        """Wait until a job is in one of the states, such as COMPLETED; returns what scontrol shows.

        Raises:
            ClusterError: it is not in time, or it ended in another state; with `explain` and the end of the controller's log.
        """
        wanted, ended = set(states), {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL"}

        def over() -> bool:
            return self.job(job).get("JobState") in wanted | ended

        with contextlib.suppress(ClusterError):
            self._wait(f"job {job}", over, timeout_s)
        found = self.job(job)
        if found.get("JobState") not in wanted:
            raise ClusterError(f"job {job} is {found.get('JobState')}, not {sorted(wanted)}: {explain()}\n{self._logs()}")
        return found

    def signal_job(self, job: str, name: str) -> None:
        """Send a signal to a job's steps, as SLURM itself does when it preempts."""
        self._run("scancel", "-s", name, job)

    def set_minutes_left(self, job: str, minutes: int) -> None:
        """Change a job's time limit, so that at least these many minutes are left, and less than one more."""
        hours, rest, seconds = map(int, self.job(job)["RunTime"].split(":"))
        passed = hours * 60 + rest + (seconds > 0) if self.job(job)["JobState"] == "RUNNING" else 0
        self._run("scontrol", "update", f"JobId={job}", f"TimeLimit={passed + minutes}")

    def release(self, job: str) -> None:
        """Let a job start that was submitted with --hold."""
        self._run("scontrol", "release", job)

    def cancel_all(self) -> None:
        """Cancel every job and wait until the nodes are free."""
        self._run("scancel", "--user", getpass.getuser(), check=False)
        self._wait("an empty queue", lambda: not self._run("squeue", "-h").strip(), 60)

    def stop(self) -> None:
        """Cancel what runs and end all daemons, and the jobs' processes with them."""
        with contextlib.suppress(ClusterError, subprocess.SubprocessError):
            self.cancel_all()
        steps = [process for node in NODES for process in self._steps_of(node)]
        if controller := self._daemons.get("slurmctld"):
            controller.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                controller.wait(10)
        kill_tree([*(daemon.pid for daemon in self._daemons.values()), *steps])
        for daemon in self._daemons.values():
            daemon.wait()
        self._daemons.clear()

    def _steps_of(self, node: str) -> list[int]:
        """The slurmstepd of a node: daemons of their own, each known by the socket that it keeps in the node's spool folder."""
        sockets = [f"{self.folder}/spool.{node}/{path.name}" for path in (self.folder / f"spool.{node}").glob(f"{node}_*")]
        inodes = {
            words[6]: words[7]
            for line in Path("/proc/net/unix").read_text(encoding="utf-8").splitlines()
            if len(words := line.split()) == 8
        }
        wanted = {f"socket:[{inode}]" for inode, path in inodes.items() if path in sockets}
        return [process for process, name in _named("slurmstepd") if name and wanted & set(_open_files(process))]

    def _spawn(self, name: str, *words: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                words, env=self._environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )

    def _run(
        self,
        *words: str,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        check: bool = True,
        timeout_s: float = 60,
    ) -> str:
        done = subprocess.run(
            words,
            env={**self._environment, **(environment or {})},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if check and done.returncode:
            raise ClusterError(f"{' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}\n{self._logs()}")
        return done.stdout

    def _wait(self, what: str, reached: Callable[[], bool], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            for name, daemon in self._daemons.items():
                if daemon.poll() is not None:
                    raise ClusterError(f"{name} ended with {daemon.returncode}\n{self._logs()}")
            with contextlib.suppress(ClusterError):
                if reached():
                    return
            if time.monotonic() > deadline:
                raise ClusterError(f"waited {timeout_s:g} s for {what}\n{self._logs()}")
            time.sleep(0.2)

    def _logs(self) -> str:
        ends = []
        for path in sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")]):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
            ends += [f"--- {path.name}", *lines] if lines else []
        return "\n".join(ends)


def install_slurm(script: Path) -> str:
    """Run tests/slurm.sh; returns why there is no SLURM, or nothing."""
    if shutil.which("bash") is None:
        return "no bash"
    done = subprocess.run(["bash", str(script)], check=False, capture_output=True, text=True)
    return done.stderr.strip() if done.returncode else ""


def kill_tree(roots: Sequence[int]) -> None:
    """SIGKILL processes and all that descend from them; they are stopped first, so that none escapes."""
    found: list[int] = []
    front = list(roots)
    while front:
        for process in front:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGSTOP)
        found += front
        front = [child for process in front for child in _children(process)]
    for process in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def descendants(roots: Sequence[int]) -> list[int]:
    """All processes that descend from some, without those."""
    found: list[int] = []
    front = list(roots)
    while front:
        front = [child for process in front for child in _children(process)]
        found += front
    return found


def _children(process: int) -> list[int]:
    children: list[int] = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            children += map(int, path.read_text(encoding="utf-8").split())
    return children


def _named(name: str) -> list[tuple[int, str]]:
    """Processes with this name."""
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if path.read_text(encoding="utf-8").strip() == name:
                found.append((int(path.parent.name), name))
    return found


def _open_files(process: int) -> list[str]:
    links = []
    for path in Path(f"/proc/{process}/fd").glob("*"):
        with contextlib.suppress(OSError):
            links.append(str(path.readlink()))
    return links


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
