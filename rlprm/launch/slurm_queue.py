"""Slurm's own programs: what a job's state is, why it waits, and each answer within a deadline."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlprm.errors import ConfigError, WorkerLost

CALL_S = 30.0  # longest wait for one answer; without a controller Slurm's programs try for about ten seconds
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT")
ENDED = (
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE"),
    *("OUT_OF_MEMORY", "REVOKED"),
)
# Slurm's reasons in words, by the beginning of their names; {nodes} is the number the job asks for.
REASONS = {
    "Resources": "waiting for {nodes} nodes to be free",
    "Priority": "jobs of higher priority go first",
    "PartitionNodeLimit": "the partition does not give one job {nodes} nodes; this will not change by waiting",
    "PartitionTimeLimit": "cluster.time is longer than the partition allows; this will not change by waiting",
    "PartitionConfig": "the partition cannot give {nodes} such nodes; this will not change by waiting",
    "PartitionDown": "the partition is closed for now",
    "PartitionInactive": "the partition is closed for now",
    "ReqNodeNotAvail": "nodes that it needs are down, drained or reserved",
    "NodeDown": "nodes that it needs are down",
    "BeginTime": "it may not start yet (after a failure Slurm waits about two minutes)",
    "Dependency": "it starts after another job",
    "JobHeldUser": "held; `scontrol release` lets it go",
    "JobHeldAdmin": "held by an administrator",
    "JobHoldMaxRequeue": "held, because it has failed to start too often",
    "QOS": "a limit of the QOS is reached",
    "Assoc": "a limit of the account is reached",
    "MaxGRES": "a limit on GPUs is reached",
    "InvalidAccount": "the account is not valid",
    "InvalidQOS": "the QOS is not valid",
    "Licenses": "waiting for licences",
    "Reservation": "waiting for its reservation",
    "None": "the scheduler has not looked at it yet",
}
# What sbatch says when it refuses, by a part of the sentence, and what to do about it.
CURES = {
    "partition": "set cluster.partition to one of those",
    "node count": "lower placement.nodes, or choose another cluster.partition",
    "node configuration": "no node of the partition has as much as is asked for: compare placement.nodes, "
    "cluster.node.cpus and cluster.node.gpus with it",
    "generic resource": "the nodes offer no such GPUs to Slurm: look at cluster.node.gpus and cluster.gpu_option",
    "feature": "no node has what cluster.constraint asks for",
    "account": "look at cluster.account and cluster.partition",
    "qos": "look at cluster.qos",
    "--time": "write cluster.time as MINUTES, HH:MM:SS or D-HH:MM:SS",
    "time limit": "lower cluster.time, or choose another cluster.partition",
    "memory": "look at --mem in cluster.extra",
    "option": "look at cluster.extra",
}

_TELLING = re.compile(r"error|fatal|failure|unrecognized|invalid", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What Slurm says of a job."""

    state: str  # as Slurm writes it; "" when Slurm does not know the job (any more)
    reason: str
    nodes: str  # the list, as Slurm writes it
    code: int | None  # of a job that has ended

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def waits(self) -> bool:
        return self.state in WAITING

    def words(self, nodes: int) -> str:
        """The state in a sentence.

        >>> Job(state="PENDING", reason="Resources", nodes="", code=None).words(2)
        'PENDING: Resources - waiting for 2 nodes to be free'
        >>> Job(state="RUNNING", reason="None", nodes="n[1-2]", code=None).words(2)
        'RUNNING on n[1-2]'
        """
        if not self.state:
            return "Slurm does not know it (any more)"
        if self.state == "PENDING":
            why = next((text for name, text in REASONS.items() if self.reason.startswith(name)), None)
            return f"PENDING: {self.reason}" + (f" - {why.format(nodes=nodes)}" if why else "")
        if self.ended:
            told = "" if self.reason in ("", "None") else f" ({self.reason})"
            return f"{self.state}{told}" + (f" on {self.nodes}" if self.nodes else "")
        return f"{self.state} on {self.nodes}" if self.nodes else self.state


class Unreachable(Exception):
    """The controller gives no answer now; the job may well go on."""


def submit_script(script: str, environment: Mapping[str, str]) -> str:
    """Hand a script in; the job's id. Slurm is asked first whether it could ever run it.

    Raises:
        ConfigError: sbatch is missing, gives no answer, or refuses: in its words, with what to do.
    """
    tried = _call(["sbatch", "--test-only"], given=script, environment=environment)
    if tried.returncode != 0:
        raise ConfigError(_refusal(tried.stderr))
    done = _call(["sbatch", "--parsable"], given=script, environment=environment)
    if done.returncode != 0:
        raise ConfigError(_refusal(done.stderr))
    return done.stdout.strip().partition(";")[0]  # on a federation: "id;cluster"


def look(job: str) -> Job:
    """What Slurm says of a job.

    Raises:
        Unreachable: nothing for now.
        ConfigError: scontrol is missing.
    """
    found = _call(["scontrol", "--oneliner", "show", "job", job])
    if found.returncode == 0:
        values = {key: _value(key, found.stdout) for key in ("JobState", "Reason", "NodeList", "ExitCode")}
        nodes = "" if values["NodeList"] == "(null)" else values["NodeList"]
        return _job(values["JobState"], values["Reason"], nodes, values["ExitCode"])
    if "Invalid job id" not in found.stderr:
        raise Unreachable(last_line(found.stderr))
    return _accounted(job)


def cancel(job: str) -> None:
    """End a job at once; one that has ended already stays as it is.

    Raises:
        WorkerLost: Slurm gives no answer, so the job may still run.
    """
    done = _call(["scancel", job])
    if done.returncode != 0 and "Invalid job id" not in done.stderr:
        raise WorkerLost(f"Slurm job {job} was not cancelled ({last_line(done.stderr)}); run `scancel {job}` yourself")


def last_line(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no answer"


def _accounted(job: str) -> Job:
    """A job that the controller has forgotten, where the site keeps accounts."""
    if shutil.which("sacct") is not None:
        columns = "--format=State,NodeList,ExitCode"
        found = _call(["sacct", "--allocations", "--noheader", "--parsable2", f"--jobs={job}", columns])
        if found.returncode == 0 and found.stdout.strip():
            state, nodes, code = last_line(found.stdout).split("|")
            return _job(state.split()[0], "", nodes, code)  # "CANCELLED by 1000"
    return Job(state="", reason="", nodes="", code=None)


def _job(state: str, reason: str, nodes: str, code: str) -> Job:
    status, _, signal = code.partition(":")
    number = int(status or 0) or (128 + int(signal) if signal and int(signal) else 0)
    return Job(state=state, reason=reason, nodes=nodes, code=number if state in ENDED else None)


def _value(key: str, line: str) -> str:
    found = re.search(rf"(?:^| ){key}=(\S*)", line)
    return found[1] if found else ""


def _refusal(said: str) -> str:
    """What sbatch says, what there is, and what to do.

    >>> _refusal("sbatch: error: Invalid --time specification")
    'Slurm refuses the job: Invalid --time specification; write cluster.time as MINUTES, HH:MM:SS or D-HH:MM:SS'
    """
    telling = [line.strip() for line in said.splitlines() if _TELLING.search(line)]
    sentence = telling[0] if telling else last_line(said)
    for start in (
        "sbatch: error: ",
        "sbatch: fatal: ",
        "sbatch: ",
        "Batch job submission failed: ",
        "allocation failure: ",
    ):
        sentence = sentence.removeprefix(start)
    cure = next((text for part, text in CURES.items() if part in sentence.lower()), None)
    if cure is not None and ("partition" in cure or "partition" in sentence.lower()):
        sentence += _partitions()
    return f"Slurm refuses the job: {sentence}" + (f"; {cure}" if cure else "")


def _partitions() -> str:
    """What there is, in words."""
    try:
        found = _call(["sinfo", "--noheader", "--format=%R|%A|%D|%c"])
    except (ConfigError, Unreachable):
        return ""
    rows: dict[str, tuple[int, int, str]] = {}
    for line in found.stdout.splitlines():
        name, states, nodes, cpus = line.split("|")
        up, total, _ = rows.get(name, (0, 0, ""))
        rows[name] = (up + sum(int(each) for each in states.split("/")), total + int(nodes), cpus)  # "allocated/idle"
    listed = [f"{name} ({up} of {total} nodes up, {cpus} CPUs each)" for name, (up, total, cpus) in rows.items()]
    return f" (partitions: {', '.join(listed)})" if listed else ""


def _call(
    command: Sequence[str], *, given: str | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """One call; the caller looks at a failure.

    Raises:
        ConfigError: the program is missing.
        Unreachable: no answer in time.
    """
    if shutil.which(command[0]) is None:
        raise ConfigError(
            f"{command[0]} is not on PATH: this machine submits to no Slurm; run the command on a login node of the cluster, "
            "or choose another cluster= (rlprm launch --dry-run prints the script without it)"
        )
    try:
        return subprocess.run(
            command,
            input=given,
            env=None if environment is None else dict(environment),
            capture_output=True,
            text=True,
            timeout=CALL_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Unreachable(f"{command[0]} gave no answer within {CALL_S:.0f} s") from error
