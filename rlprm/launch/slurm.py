"""``cluster=slurm``: a batch job whose one step starts the head on its first node and a worker on each of the others.

The script holds nothing secret, and neither does the environment that sbatch hands to Slurm: Slurm keeps a copy of that,
and sites may keep it in their accounts. Ray's token and the values of ``cluster.secrets`` lie in files of the launch
folder that only their owner may read; the nodes read them there, and the secrets are removed when the job has ended.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping

from rlprm.config_cluster import SlurmCluster
from rlprm.errors import ConfigError, WorkerLost
from rlprm.launch.backends import Say, Status
from rlprm.launch.launcher import SUBMITTED
from rlprm.launch.processes import GRACE_S, INTERRUPTED, Wishes
from rlprm.launch.slurm_queue import Job, Unreachable, cancel, look, submit_script
from rlprm.launch.streams import follow as following
from rlprm.launch.task import EXIT, HEAD, STOP, Task, exit_code, put
from rlprm.run.redact import is_secret_name

JOB = "slurm_job"  # in the launch folder: the job's id
OUTPUT = "slurm.log"  # ... what the job's processes print, the run's own output included
SECRETS = "secrets"  # ... {name: value}, readable by its owner only
STOPPING_S = GRACE_S + 120.0  # a run that was asked to end has saved and ended within this, or its job is cancelled
SETTLING_S = 60.0  # for a job whose run has ended to leave its nodes
SILENT_S = 900.0  # longest silence of Slurm's controller while the job is watched
LOOK_S = 0.3

NODE = """\
cd {directory} || exit 1
{setup}
command -v {python} >/dev/null || {{ echo "rlprm: $SLURMD_NODENAME has no {python} (cluster.python)" >&2; exit 1; }}
exec {python} -u -m rlprm.launch.slurm_node {folder}
"""
SCRIPT = """\
#!/bin/bash
{lines}

cd {folder} || {{ echo "rlprm: $(hostname) does not see {folder}; output_dir must be on shared storage" >&2; exit 1; }}
rm -f {traces}  # of an earlier start of this job
trap 'touch {stop}; told=1' TERM  # before the time limit: the run finishes its step, saves, ends; also when the job is put back
srun {options} bash -c {node} &
step=$!
wait "$step"; code=$?
while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done
[ -f {exit} ] && code=$(cat {exit})
[ -n "$told" ] || rm -f {secrets}  # a job that was put back needs them again
exit "$code"
"""


def script(task: Task, cluster: SlurmCluster) -> str:
    """The batch script, whole."""
    counts = [f"--nodes={task.nodes}", "--ntasks-per-node=1", f"--cpus-per-task={cluster.node.cpus}"]
    asked = [f"--job-name=rlprm-{task.id}", *counts]
    if task.node_gpus:
        form = "--gres=gpu:{}" if cluster.gpu_option == "gres" else "--gpus-per-node={}"
        asked.append(form.format(task.node_gpus))
    given = {
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "time": cluster.time,
    }
    asked += [f"--{option}={value}" for option, value in given.items() if value is not None]
    output = str(task.path / OUTPUT).replace("%", "%%")  # a single one stands for something in Slurm's names
    asked += [f"--output={output}", "--open-mode=append"]
    # after the loss of a node, or when it had to make room, the same script starts again and the run continues
    asked.append("--requeue" if "resume=auto" in task.command else "--no-requeue")
    if cluster.save_s:
        asked.append(f"--signal=B:TERM@{cluster.save_s}")
    node = NODE.format(
        directory=shlex.quote(task.directory),
        setup="\n".join(["set -e", *cluster.setup, "set +e"] if cluster.setup else [":"]),
        python=shlex.quote(task.python),
        folder=shlex.quote(task.folder),
    )
    # all parts end in order when the head has ended; what has not after a minute is killed
    step = [*counts, f"--ntasks={task.nodes}", "--export=ALL", "--kill-on-bad-exit=1", "--wait=60"]
    step += [line for line in cluster.extra if line in ("--no-kill", "-k")]
    return SCRIPT.format(
        lines="\n".join(f"#SBATCH {line}" for line in [*map(shlex.quote, asked), *cluster.extra]),
        folder=shlex.quote(task.folder),
        traces=" ".join((HEAD, EXIT, STOP)),
        stop=STOP,
        exit=EXIT,
        secrets=SECRETS,
        options=" ".join(step),
        node=shlex.quote(node),
    )


def dry_run(task: Task, cluster: SlurmCluster) -> str:
    """The script as it would be submitted, and how."""
    return f"# sbatch --parsable < this script\n{script(task, cluster)}"


def submit(task: Task, cluster: SlurmCluster, say: Say) -> None:
    """Hand the job in and return.

    Raises:
        ConfigError: there is no Slurm here, or it refuses the job: its words, and what to do.
        WorkerLost: no answer; the job may have been accepted.
    """
    text = script(task, cluster)
    values = {name: os.environ[name] for name in task.secrets if os.environ.get(name)}
    descriptor = os.open(task.path / SECRETS, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(values, file)
    put(task.path, SUBMITTED, "")  # from here on the job may exist, whatever is answered
    try:
        job = submit_script(text, handed_on(os.environ, task.secrets, text))
    except ConfigError:
        (task.path / SUBMITTED).unlink()
        forget(task)
        raise
    except Unreachable as error:
        raise WorkerLost(
            f"Slurm does not answer ({error}), so it is not known whether the job was accepted; look with squeue --me, and "
            f"for a job named {task.id} before the launch is tried again"
        ) from error
    (task.path / JOB).write_text(job + "\n", encoding="utf-8")
    say(f"Slurm job {job} is submitted; what it prints is in {task.path / OUTPUT}")


def launch(task: Task, cluster: SlurmCluster, say: Say) -> int:
    """Submit, say what the job waits for, print what it prints; the run's exit code.

    The first Ctrl-C lets the run finish its step, save and end (a job that waits is cancelled), the second cancels it.

    Raises:
        ConfigError: as :func:`submit`.
        WorkerLost: the job has ended and its run left no exit code, or Slurm gives no answer any more.
    """
    submit(task, cluster, say)
    wishes = Wishes()
    wishes.on_signals()
    watched = Watched(task, cluster.poll_s, say, wishes)
    for text in following(task.path / OUTPUT, watched.over):
        sys.stdout.write(text)
        sys.stdout.flush()
    return watched.code()


def status(task: Task, cluster: SlurmCluster) -> Status:
    """What Slurm says, and the run's exit code where it has one.

    Slurm comes first: a job that was put back into the queue has left the exit code of its first try.
    """
    code = exit_code(task.folder)
    if not (task.path / JOB).is_file():
        return Status(state="lost" if code is None else "ended", detail="it was not handed to Slurm", exit_code=code)
    number = _job(task)
    try:
        found = look(number)
    except (Unreachable, ConfigError) as error:
        # also where there is an exit code: it may be the first try's of a job that was put back
        return Status(state="unknown", detail=f"Slurm job {number}: Slurm does not answer ({error})", exit_code=code)
    detail = f"Slurm job {number}: {found.words(task.nodes)}"
    if found.ended or not found.state:
        forget(task)
        code = _code(task, found)
        return Status(state="lost" if code is None else "ended", detail=detail, exit_code=code)
    return Status(state="waiting" if found.waits else "running", detail=detail, exit_code=None)


def logs(task: Task, follow: bool) -> Iterator[str]:
    """What the job's processes have printed; with ``follow`` until the job has ended."""
    watched = Watched(task, 2.0, lambda sentence: None, Wishes())
    return following(task.path / OUTPUT, watched.over if follow else lambda: True)


def stop(task: Task) -> None:
    """Let the run finish its step, save and end; wait for it. A job that waits, or that does not end, is cancelled.

    Raises:
        WorkerLost: Slurm gives no answer, so the job may still run.
    """
    wishes = Wishes()
    wishes.ask(signal.SIGINT, "rlprm stop")
    watched = Watched(task, 1.0, lambda sentence: None, wishes)
    while not watched.over():
        time.sleep(LOOK_S)


class Watched:
    """A job on its way: says how its state changes, and hands on the wish to end it."""

    def __init__(self, task: Task, poll_s: float, say: Say, wishes: Wishes) -> None:
        self._task = task
        self._job = _job(task)
        self._poll_s = poll_s
        self._say = say
        self._wishes = wishes
        self._asked: float | None = None  # when the run was asked to end
        self._leaving: float | None = None  # since when the run has ended and its job has not
        self._found: Job | None = None  # what Slurm said last
        self._over = False
        self._told = ""
        self._next = 0.0
        self._answered = time.monotonic()

    def over(self) -> bool:
        """Has the job ended? Slurm is asked every ``poll_s`` seconds.

        Raises:
            WorkerLost: Slurm gives no answer any more, or does not cancel the job.
        """
        now = time.monotonic()
        if not self._over and now >= self._next:
            self._next = now + self._poll_s
            self._look(now)
        if not self._over and self._wishes.asked is not None:
            self._hand_on(now)
        return self._over

    def code(self) -> int:
        """The run's exit code.

        Raises:
            WorkerLost: it left none.
        """
        code = INTERRUPTED if self._found is None else _code(self._task, self._found)
        if code is None and self._wishes.asked is not None:
            return INTERRUPTED
        if code is None:
            raise WorkerLost(
                f"Slurm job {self._job} has ended and its run left no exit code: {self._found.words(self._task.nodes)}. "
                f"Look at {self._task.path / OUTPUT}; the same command continues from the last checkpoint"
            )
        return code

    def _look(self, now: float) -> None:
        before, found = self._found, _look(self._job)
        words = found.words(self._task.nodes) if found is not None else "Slurm does not answer; it is asked again"
        if words != self._told:
            self._say(f"Slurm job {self._job}: {words}")
            self._told = words
        if found is None:
            if now - self._answered > SILENT_S:
                raise WorkerLost(
                    f"Slurm gives no answer about job {self._job} for {SILENT_S:.0f} s; the job may go on: rlprm status"
                )
            return
        self._answered, self._found = now, found
        has_code = exit_code(self._task.folder) is not None
        self._leaving = (self._leaving or now) if has_code and found.state == "COMPLETING" else None
        # a job that will be put back into the queue may seem to have ended for a moment
        self._over = (found.ended or not found.state) and (has_code or found == before)
        self._over = self._over or (self._leaving is not None and now - self._leaving > SETTLING_S)
        if self._over:
            forget(self._task)

    def _hand_on(self, now: float) -> None:
        waits = self._found is not None and self._found.waits
        if self._asked is None and not waits and not self._wishes.hard:
            self._say("the run is asked to finish its step and save; Ctrl-C again cancels its job")
            put(self._task.path, STOP, "")
            self._asked = now
        elif waits or self._wishes.hard or now - self._asked > STOPPING_S:
            self._say(f"Slurm job {self._job} is cancelled")
            try:
                cancel(self._job)
            except Unreachable as error:
                raise WorkerLost(
                    f"Slurm job {self._job} was not cancelled ({error}); run `scancel {self._job}`"
                ) from error
            self._over = True
            forget(self._task)


def forget(task: Task) -> None:
    """Remove the values of secrets."""
    (task.path / SECRETS).unlink(missing_ok=True)


def handed_on(environ: Mapping[str, str], secrets: tuple[str, ...], text: str) -> dict[str, str]:
    """The environment that sbatch sees, and with it Slurm: without secrets, and without what would change the script.

    Variables of an allocation that this shell may be in belong to that one, and ``SBATCH_PARTITION`` would win over the
    script's own line.

    >>> handed_on({"PATH": "/bin", "HF_TOKEN": "x", "SLURM_JOB_ID": "7", "SBATCH_QOS": "a"}, (), "#SBATCH --qos=b")
    {'PATH': '/bin'}
    """
    lines = {line.removeprefix("#SBATCH --").partition("=")[0] for line in text.splitlines()}
    overruled = {f"SBATCH_{option.replace('-', '_').upper()}" for option in lines}
    overruled |= {"SBATCH_TIMELIMIT"} if "time" in lines else set()
    return {
        name: value
        for name, value in environ.items()
        if name not in secrets
        and not is_secret_name(name)
        and name not in overruled
        and (name == "SLURM_CONF" or not name.startswith("SLURM"))
    }


def _job(task: Task) -> str:
    try:
        return (task.path / JOB).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"launch {task.id} was not handed to Slurm: there is no {task.path / JOB}") from error


def _look(job: str) -> Job | None:
    try:
        return look(job)
    except Unreachable:
        return None


def _code(task: Task, found: Job) -> int | None:
    """The run's own exit code; where it left none, Slurm's, which says little of a job that was killed."""
    code = exit_code(task.folder)
    if code is not None:
        return code
    if found.state == "CANCELLED":
        return INTERRUPTED
    return found.code if found.state in ("COMPLETED", "FAILED") else None
