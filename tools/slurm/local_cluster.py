"""A real Slurm of two nodes on this one machine, to try a batch file before a cluster sees it.

    python tools/slurm/local_cluster.py FOLDER          prints the SLURM_CONF to export; ends with Ctrl-C
    export SLURM_CONF=FOLDER/slurm.conf; sinfo; sbatch --partition low --nodes 2 tools/slurm/train.sbatch ...

Partition `high` preempts jobs of `low`: they get their --signal, GRACE seconds, and are requeued. Needs Debian's
slurmctld, slurmd, slurm-client and munge, which MM_INSTALL_SLURM=1 lets root install by itself. Nodes have no cgroups
and no accounting; munge has a key of its own, and nothing outside FOLDER is read or written.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = os.pathsep.join(
    [os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]
)  # Debian has daemons beside a user's path
GRACE = 20  # seconds between the signal of a preemption and the kill
CONFIG = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool/%n
StateSaveLocation={folder}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{parameters}
ReturnToService=2
KillWait=10
MinJobAge=600
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=1000
PartitionName=low Nodes=n[1-2] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes=n[1-2] PriorityTier=10 PreemptMode=OFF
"""


@dataclass
class Cluster:
    """A Slurm that runs. `environment` is what its commands need."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def command(self, *words: str | Path) -> str:
        """What a Slurm command printed. Raises CalledProcessError, with its complaint as a note."""
        try:
            done = subprocess.run(
                list(map(str, words)), env=self.environment, capture_output=True, text=True, timeout=60, check=True
            )
        except subprocess.CalledProcessError as error:
            error.add_note(error.stderr)
            raise
        return done.stdout.strip()

    def fact(self, job: str, name: str) -> str:
        """A field of `scontrol show job`, as in JobState: RUNNING."""
        words = self.command("scontrol", "show", "job", job).split()
        return dict(word.partition("=")[::2] for word in words)[name]

    def logs(self) -> str:
        """The end of every daemon's log."""
        return "\n".join(f"== {log.name}\n{log.read_text()[-3000:]}" for log in sorted(self.folder.glob("*.log")))

    def _start(self, name: str, *words: str | Path) -> None:
        with open(self.folder / f"{name}.log", "wb") as log:
            self.daemons[name] = subprocess.Popen(
                [str(shutil.which(str(words[0]), path=PROGRAMS)), *map(str, words[1:])],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _wait(self, what: str, seconds: float, *words: str) -> None:
        """Until a command prints `what`. Raises RuntimeError with the logs."""
        deadline, said = time.monotonic() + seconds, ""
        while what not in said:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{' '.join(words)} does not say {what} in {seconds:g} s but {said}\n{self.logs()}")
            for name, daemon in self.daemons.items():
                if daemon.poll() is not None:
                    raise RuntimeError(f"{name} ended with {daemon.returncode}\n{self.logs()}")
            time.sleep(0.2)
            try:
                said = self.command(*words)
            except subprocess.CalledProcessError as error:
                said = error.stderr


def missing() -> list[str]:
    """The packages whose program is not here."""
    programs = dict(zip(PACKAGES, ("slurmctld", "slurmd", "srun", "munged"), strict=True))
    return [package for package, program in programs.items() if shutil.which(program, path=PROGRAMS) is None]


def install() -> None:
    """Have the packages, with apt-get where MM_INSTALL_SLURM=1 and this is root.

    Raises RuntimeError with the log of the installation, or with what to do.
    """
    if not missing():
        return
    command = ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES]
    if os.environ.get("MM_INSTALL_SLURM") != "1" or os.geteuid() != 0:
        raise RuntimeError(
            f"{', '.join(missing())}: not installed; as root: {' '.join(command)}, or MM_INSTALL_SLURM=1"
        )
    log = ""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["apt-get", "update"], command):
        try:
            done = subprocess.run(
                words,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=180,
                check=False,
            )
        except OSError as error:
            raise RuntimeError(f"{' '.join(words)}: {error}") from error
        log += f"$ {' '.join(words)}\n{done.stdout}"
    if missing():
        raise RuntimeError(f"{', '.join(missing())}: not installed\n{log}")


@contextlib.contextmanager
def local_cluster(folder: Path, grace: int = GRACE, user_signal: bool = True) -> Iterator[Cluster]:
    """A Slurm in an empty folder, whose daemons and jobs end with the block.

    `grace`: seconds between a preemption's signal and its kill. `user_signal`: preemption sends a job's --signal;
    otherwise TERM. Raises RuntimeError where Slurm is not installed or does not start, with its logs.
    """
    install()
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("state", "spool/n1", "spool/n2"):
        (folder / name).mkdir(parents=True)
    parameters = "SlurmctldParameters=preempt_send_user_signal" if user_signal else ""
    text = CONFIG.format(
        folder=folder,
        host=socket.gethostname().split(".")[0],
        user=getpass.getuser(),
        ports=_free_ports(3),
        grace=grace,
        parameters=parameters,
    )
    (folder / "slurm.conf").write_text(text, encoding="utf-8")
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    cluster = Cluster(folder, {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")})
    try:
        munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "seed")]
        cluster._start("munged", "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge)
        cluster._wait("MUNGE:", 10, "munge", "--no-input", f"--socket={folder}/munge.socket")
        cluster._start("slurmctld", "slurmctld", "-D", "-c")
        for node in ("n1", "n2"):
            cluster._start(f"slurmd-{node}", "slurmd", "-D", "-N", node)
        cluster._wait("2 idle", 60, "sinfo", "--noheader", "--partition=low", "--format=%D %T")
        yield cluster
    finally:
        _end(cluster)


def _free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _end(cluster: Cluster) -> None:
    """End the jobs, then the daemons, slurmctld and munged last."""
    try:
        if len(cluster.daemons) == 4:
            user = f"--user={getpass.getuser()}"
            cluster.command("scancel", "--full", "--signal=KILL", user)
            cluster.command("scancel", user)
            cluster._wait("none", 30, "bash", "-c", '[ -n "$(squeue --noheader)" ] || echo none')
    finally:
        for daemon in reversed(cluster.daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def main(folder: Path) -> int:
    """Run until Ctrl-C or TERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), local_cluster(folder.resolve()):
        print(f"export SLURM_CONF={folder.resolve()}/slurm.conf", flush=True)
        signal.pause()
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(f"{__doc__}")
    sys.exit(main(Path(sys.argv[1])))
