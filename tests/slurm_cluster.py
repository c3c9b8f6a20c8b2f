"""A real Slurm on this machine: munge, a controller and two nodes, in a folder of their own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests import launching

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")

CONF = """
ClusterName=tiny
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
JobRequeue=1
ReturnToService=2
KillWait=60
GresTypes=gpu
SchedulerParameters=sched_min_interval=100000,batch_sched_delay=0
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 Gres=gpu:2
PartitionName=all Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
"""

GPUS = "NodeName=n[1-2] Name=gpu File=/dev/null\nNodeName=n[1-2] Name=gpu File=/dev/zero\n"
"""Slurm hands them out like real ones; CUDA finds none."""


def missing() -> str:
    """Why no cluster can be started here; empty where one can."""
    if os.geteuid() != 0:
        return "Slurm's daemons are started by root"
    lacking = [program for program in PROGRAMS if not shutil.which(program)]
    return f"{', '.join(lacking)} not installed (`make test-tools` does, where apt-get can)" if lacking else ""


def until(condition: Callable[[], bool], seconds: float, what: Callable[[], str] = lambda: "") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what()}"
        time.sleep(0.1)


class Cluster:
    """Two nodes, n1 and n2, on this machine, until `stop`."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # munge's user must get there, so not pytest's folder
        self.folder.chmod(0o755)
        self._started: list[subprocess.Popen[bytes]] = []
        self.environment = launching.environment() | {
            "SLURM_CONF": str(self.folder / "slurm.conf"), "PYTHONPATH": str(launching.ROOT),
            "OMP_NUM_THREADS": ""}  # the scripts say how many
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        munge = self.folder / "munge"
        munge.mkdir(mode=0o755)
        (munge / "key").write_bytes(os.urandom(1024))
        for path in (munge / "key", munge):
            shutil.chown(path, "munge", "munge")
        (munge / "key").chmod(0o600)
        self._daemon("runuser", "-u", "munge", "--", "munged", "--foreground", "--force", f"--socket={munge}/socket",
                     f"--key-file={munge}/key", f"--pid-file={munge}/pid", f"--log-file={munge}/log",
                     f"--seed-file={munge}/seed")
        until((munge / "socket").exists, 20)
        host = socket.gethostname().split(".")[0]
        ports = [launching.free_port() for _ in range(3)]
        (self.folder / "slurm.conf").write_text(CONF.format(host=host, folder=self.folder, ports=ports))
        (self.folder / "gres.conf").write_text(GPUS)
        (self.folder / "state").mkdir()
        self._daemon("slurmctld", "-D")
        for node in ("n1", "n2"):
            (self.folder / f"spool-{node}").mkdir()
            self._daemon("slurmd", "-D", "-N", node)
        until(lambda: self.call("sinfo", "-h", "-o", "%T %D") == "idle 2", 60, self.logs)

    def _daemon(self, *words: str) -> None:
        with (self.folder / "daemons.log").open("ab") as log:
            self._started.append(subprocess.Popen(words, env=self.environment, stdout=log, stderr=log,
                                                  stdin=subprocess.DEVNULL))

    def call(self, *words: str | Path, extra: Mapping[str, str] | None = None) -> str:
        """Run a Slurm command in the repository's root; what it printed, stripped."""
        done = subprocess.run(list(map(str, words)), cwd=launching.ROOT, env=self.environment | dict(extra or {}),
                              capture_output=True, text=True, timeout=60)
        return (done.stdout + done.stderr).strip()

    def submit(self, log: Path, *words: str | Path, python: Path = launching.BIN / "python",
               shape: Sequence[str] = ("--nodes=2", "--ntasks-per-node=1")) -> str:
        """sbatch, by default on both nodes; the job's number."""
        return self.call("sbatch", "--parsable", *shape, f"--output={log}", *words,
                         extra={"PYTHON": str(python), "LOG_FOLDER": str(log.parent / "ranks")})

    def state(self, job: str) -> str:
        return self.call("squeue", "-h", "-j", job, "-t", "all", "-o", "%T")

    def logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-2000:]}"
                         for path in sorted(self.folder.glob("*.log")))

    def stop(self) -> None:
        if (self.folder / "slurm.conf").exists():
            self.call("scancel", "--signal=KILL", "--full", "--user=root")
            deadline = time.monotonic() + 15
            while self.call("squeue", "-h") and time.monotonic() < deadline:
                self.call("scancel", "--user=root")
                time.sleep(0.3)
        for process in reversed(self._started):
            process.send_signal(signal.SIGTERM)
        for process in self._started:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
