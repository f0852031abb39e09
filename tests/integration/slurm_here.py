"""A real Slurm of several nodes on this machine: munge, one controller, and one ``slurmd`` per node, all on loopback.

Everything lies in a folder of its own, listens on ports of its own, and is gone after ``with``. Where the machine does
not allow it, :class:`Unavailable` says why.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")
PACKAGES = ("slurm-wlm", "munge")
INSTALL_S = 120.0
START_S = 30.0
CALL_S = 10.0  # nothing of Slurm is called without a limit: srun waits for ever for nodes that do not come
NODES = ("n1", "n2", "n3")
CPUS = 4  # of each node, as Slurm believes
DEVICES = ("/dev/null", "/dev/zero")  # ... and its GPUs: Slurm wants to see that they exist

CONFIG = """\
ClusterName=here
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
{authentication}
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobcomp.txt
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0
GresTypes=gpu
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=10
InactiveLimit=0
MinJobAge=300
SlurmctldTimeout=30
SlurmdTimeout=30
{nodes}
PartitionName=all Nodes={names} Default=YES MaxTime=INFINITE State=UP
PartitionName=short Nodes={first} MaxTime=10 State=UP
"""


class Unavailable(Exception):
    """Slurm cannot run here, and why."""


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """A Slurm that answers."""

    folder: Path
    environment: Mapping[str, str]  # for whoever talks to it
    daemons: Mapping[str, subprocess.Popen[bytes]]
    authentication: str

    def ask(self, *words: str) -> str:
        """What one of Slurm's programs prints."""
        done = subprocess.run(
            words, env=dict(self.environment), capture_output=True, text=True, timeout=CALL_S, check=True
        )
        return done.stdout


@contextmanager
def slurm_here() -> Iterator[Slurm]:
    """Slurm, for as long as the block lasts.

    Raises:
        Unavailable: not root, not installed and not to be installed, or its daemons do not start.
    """
    if os.geteuid() != 0:
        raise Unavailable("its daemons start jobs of other users, which takes root")
    _install()
    folder = Path(tempfile.mkdtemp(prefix="rlprm-slurm-"))
    folder.chmod(0o755)  # munge wants its socket to be reachable by everyone
    daemons: dict[str, subprocess.Popen[bytes]] = {}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
    environment["SLURM_CONF"] = str(folder / "slurm.conf")
    try:
        for name in ("state", "log", "munge", *(f"spool.{node}" for node in NODES)):
            (folder / name).mkdir(mode=0o755)
        authentication = _munge(folder, daemons)
        _configure(folder, authentication)
        daemons["slurmctld"] = _daemon(folder, "slurmctld", ["slurmctld", "-D"], environment)
        for node in NODES:
            daemons[node] = _daemon(folder, node, ["slurmd", "-D", "-N", node], environment)
        slurm = Slurm(folder=folder, environment=environment, daemons=daemons, authentication=authentication)
        _wait_until_idle(slurm)
        yield slurm
        _cancel_all(slurm)
    finally:
        _end(daemons, environment["SLURM_CONF"])
        shutil.rmtree(folder)


def _install() -> None:
    if not _missing():
        return
    if shutil.which("apt-get") is None:
        raise Unavailable(f"{', '.join(_missing())} not found, and there is no apt-get")
    begin = time.monotonic()
    for words in (("update",), ("install", "-y", "--no-install-recommends", *PACKAGES)):
        left = INSTALL_S - (time.monotonic() - begin)
        try:
            done = subprocess.run(
                ["apt-get", "-q", *words],
                env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
                capture_output=True,
                text=True,
                timeout=left,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise Unavailable(f"apt-get {words[0]} took more than {left:.0f} s") from error
        if done.returncode != 0 and words[0] == "install":
            raise Unavailable(f"apt-get install {' '.join(PACKAGES)} failed: {done.stderr.strip().splitlines()[-1:]}")
    if _missing():
        raise Unavailable(f"{', '.join(_missing())} not found after the installation")


def _missing() -> list[str]:
    return [program for program in PROGRAMS if shutil.which(program) is None]


def _munge(folder: Path, daemons: dict[str, subprocess.Popen[bytes]]) -> str:
    """Lines of slurm.conf; without munge (and the reason is printed) anybody may say to be anybody, on loopback."""
    key, socket_path = folder / "munge" / "key", folder / "munge" / "socket"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    files = [f"--{name}-file={folder / 'munge' / name}" for name in ("key", "pid", "log", "seed")]
    reason = "munged not found"
    if shutil.which("munged") is not None:
        command = ["munged", "--foreground", "--force", f"--socket={socket_path}", *files]
        daemons["munged"] = _daemon(folder, "munged", command, os.environ)
        deadline = time.monotonic() + 5.0
        while daemons["munged"].poll() is None and time.monotonic() < deadline:
            if socket_path.is_socket():
                return f"AuthType=auth/munge\nAuthInfo=socket={socket_path}\nCredType=cred/munge"
            time.sleep(0.05)
        reason = (folder / "log" / "munged.out").read_text(encoding="utf-8").strip()[-200:]
        _end({"munged": daemons.pop("munged")}, None)
    print(f"Slurm runs without munge: {reason}")
    return "AuthType=auth/none\nCredType=cred/none"


def _configure(folder: Path, authentication: str) -> None:
    first, *ports = _free_ports(1 + len(NODES))
    nodes = "\n".join(
        f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} RealMemory=8000 "
        f"Gres=gpu:{len(DEVICES)} State=UNKNOWN"
        for name, port in zip(NODES, ports, strict=True)
    )
    text = CONFIG.format(
        folder=folder, authentication=authentication, port=first, nodes=nodes, names=",".join(NODES), first=NODES[0]
    )
    (folder / "slurm.conf").write_text(text, encoding="utf-8")
    devices = "".join(f"NodeName={','.join(NODES)} Name=gpu File={device}\n" for device in DEVICES)
    (folder / "gres.conf").write_text(devices, encoding="utf-8")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _daemon(folder: Path, name: str, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    with (folder / "log" / f"{name}.out").open("wb") as output:
        return subprocess.Popen(
            list(command),
            env=dict(environment),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait_until_idle(slurm: Slurm) -> None:
    deadline, seen = time.monotonic() + START_S, "no answer"
    while time.monotonic() < deadline:
        for name, daemon in slurm.daemons.items():
            if daemon.poll() is not None:
                said = (slurm.folder / "log" / f"{name}.out").read_text(encoding="utf-8", errors="replace")
                raise Unavailable(f"{name} ended with code {daemon.returncode}: {said.strip()[-300:]}")
        with suppress(subprocess.SubprocessError):
            seen = slurm.ask("sinfo", "--noheader", "--Node", "--partition=all", "--format=%N %t")
            if seen.split().count("idle") == len(NODES):
                return
        time.sleep(0.3)
    raise Unavailable(f"its nodes are not idle after {START_S:.0f} s: {seen}")


def _cancel_all(slurm: Slurm) -> None:
    """No job may outlive the daemons that would end it."""
    deadline = time.monotonic() + 40.0
    with suppress(subprocess.SubprocessError):
        while (jobs := slurm.ask("squeue", "--noheader", "--format=%i").split()) and time.monotonic() < deadline:
            slurm.ask("scancel", *jobs)
            time.sleep(0.5)


def _end(daemons: Mapping[str, subprocess.Popen[bytes]], config: str | None) -> None:
    for daemon in reversed(daemons.values()):
        with suppress(ProcessLookupError):
            daemon.send_signal(signal.SIGTERM)
    for daemon in daemons.values():
        try:
            daemon.wait(timeout=10.0)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait(timeout=10.0)
    for process in psutil.process_iter() if config is not None else ():
        # steps are children of nobody, but all that belongs to this Slurm carries its configuration
        with suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get("SLURM_CONF") == config:
                process.kill()
