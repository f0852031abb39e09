"""``cluster=kuberay``: a RayJob, applied and watched through kubectl.

The launch folder is on the claim that the pods mount; this machine keeps a copy of the task in a folder of the same
name, so that ``rlprm status``, ``logs`` and ``stop`` find it again.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from typing import Any

import yaml

from rlprm.config_cluster import KubeRayCluster
from rlprm.errors import ConfigError, WorkerLost
from rlprm.launch.backends import Say, Status
from rlprm.launch.kubectl import Log, Unreachable, ask, ask_object, kubectl, require
from rlprm.launch.launcher import SUBMITTED, read_cluster
from rlprm.launch.manifest import in_pod, job_name, manifest
from rlprm.launch.processes import GRACE_S, INTERRUPTED
from rlprm.launch.task import EXIT, LOG, STOP, Task, exit_code, put

SILENT_S = 300.0  # longest silence of the cluster while the job is watched
ASK_TRIES = 3  # a head that runs is asked to stop so often before its job is deleted
TIDY_S = 10.0  # for an answer that nobody waits for
ENDED = ("Complete", "Failed", "ValidationFailed")
_EXIT = re.compile(r"exit code (\d+)")


def dry_run(task: Task, cluster: KubeRayCluster) -> str:
    """The manifest as it would be applied, and the command that applies it."""
    return f"# {' '.join(kubectl(cluster, 'apply', '-f', '-'))} < this manifest\n{text(task, cluster)}"


def text(task: Task, cluster: KubeRayCluster) -> str:
    """The objects as one YAML text."""
    return yaml.dump_all(manifest(task, cluster, version("ray")), Dumper=_Readable, sort_keys=False, width=120)


class _Readable(yaml.SafeDumper):
    """Nothing is abbreviated by references, and texts of several lines stay as they are."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Readable.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def check(task: Task, cluster: KubeRayCluster) -> None:
    """Have the cluster look at the manifest; nothing is made there.

    Raises:
        ConfigError: kubectl is missing, the manifest cannot be made, or the cluster does not answer or refuses it.
    """
    given = text(task, cluster)
    require()
    try:
        ask(cluster, "apply", "--dry-run=server", "-f", "-", given=given)
    except Unreachable as error:
        raise ConfigError(f"{error} (cluster.context, cluster.namespace)") from error


def submit(task: Task, cluster: KubeRayCluster, say: Say) -> None:
    """Apply the manifest; the job goes on without this machine.

    Raises:
        ConfigError: kubectl is missing, or the cluster refuses the manifest; nothing of it is left there.
        WorkerLost: there was no answer, so the job may have been made.
    """
    given, name = text(task, cluster), job_name(task.id)
    require()
    put(task.path, SUBMITTED, f"{cluster.namespace}/{name}\n")
    try:
        ask(cluster, "apply", "-f", "-", given=given)
    except Unreachable as error:
        try:
            made = ask_object(cluster, "rayjob", name) is not None
        except Unreachable as again:
            raise WorkerLost(
                f"it is not known whether RayJob {cluster.namespace}/{name} was made ({error}; {again}); "
                f"rlprm status {task.id} asks again, rlprm stop {task.id} deletes it"
            ) from error
        if not made:
            forget(task)
            (task.path / SUBMITTED).unlink(missing_ok=True)
            raise ConfigError(str(error)) from error
    say(f"RayJob {cluster.namespace}/{name} is applied")


def launch(task: Task, cluster: KubeRayCluster, say: Say) -> int:
    """Apply, wait for the pods, follow the run's log; its exit code. Ctrl-C lets the run finish its step, save and end.

    Raises:
        ConfigError: see :func:`check`; nothing was made.
        WorkerLost: the pods did not come within ``cluster.wait_s`` seconds, somebody deleted the job, or the cluster has
            given no answer for long. Whatever was made goes on.
    """
    try:
        submit(task, cluster, say)
        watched = Watched(task, cluster, say)
        _wait_until_running(watched, task, cluster, say)
        for lines in Log(cluster, job_name(task.id), say).pieces(watched.over):
            sys.stdout.write(lines)
            sys.stdout.flush()
        return watched.code()
    except KeyboardInterrupt:
        say("asked the run to finish its step and save; Ctrl-C again deletes its pods at once")
        _stop(task, cluster)
        raise


def status(task: Task, cluster: KubeRayCluster) -> Status:
    """What the operator says of the job. The exit code is written down here: the cluster forgets its jobs."""
    name = job_name(task.id)
    try:
        job = ask_object(cluster, "rayjob", name)
    except Unreachable as error:
        return Status(state="unknown", detail=str(error), exit_code=None)
    if job is None:
        forget(task)
        kept = f"{in_pod(task, cluster).folder}/{EXIT}"
        detail = f"there is no RayJob {name} any more; if its run has ended by itself, {kept} on the claim says how"
        return Status(state="lost", detail=detail, exit_code=None)
    state, found = _state(job), job.get("status", {})
    detail = ", ".join(str(found[key]) for key in ("jobDeploymentStatus", "jobStatus", "message") if found.get(key))
    if state in ENDED:
        return Status(state="ended", detail=detail, exit_code=_keep(task, _code(job)))
    return Status(state="running" if state == "Running" else "waiting", detail=detail or "not seen yet", exit_code=None)


def logs(task: Task, follow: bool) -> Iterator[str]:
    """Lines that the run has printed (and goes on to print).

    Raises:
        ConfigError: kubectl is missing or fails, for example because the pods are gone.
        WorkerLost: the job is gone, or the cluster has given no answer for long.
    """
    cluster: KubeRayCluster = read_cluster(task.path)
    name = job_name(task.id)
    require()
    if follow and exit_code(task.path) is None:
        say = lambda sentence: print(f"rlprm logs: {sentence}", file=sys.stderr, flush=True)  # noqa: E731
        yield from Log(cluster, name, say).pieces(Watched(task, cluster, say).over)
        return
    with subprocess.Popen(kubectl(cluster, "logs", f"job/{name}"), stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        try:
            yield from child.stdout
            code = child.wait()
        finally:
            child.terminate()
    if code != 0:
        kept = f"{in_pod(task, cluster).folder}/{LOG}"
        raise ConfigError(f"kubectl logs failed for {name}; what the run printed is also in {kept} on the claim")


def stop(task: Task) -> None:
    """Let the run finish its step, save and end; wait for it; where no head can be asked, or it takes too long, delete the job.

    Raises:
        WorkerLost: the cluster gives no answer, so the job may go on.
    """
    _stop(task, read_cluster(task.path))


def forget(task: Task) -> None:
    """Delete the ConfigMap of a job that has ended; without an answer it is tried another time."""
    if not (task.path / SUBMITTED).exists():
        return
    with suppress(Unreachable, ConfigError):
        cluster = read_cluster(task.path)
        ask(cluster, "delete", "configmap", job_name(task.id), "--ignore-not-found", "--wait=false", within_s=TIDY_S)
        (task.path / SUBMITTED).unlink(missing_ok=True)


class Watched:
    """A job on its way. Where there is no answer, it is asked again; its end is written down."""

    def __init__(self, task: Task, cluster: KubeRayCluster, say: Say) -> None:
        self.state = ""  # what was seen last
        self._task = task
        self._cluster = cluster
        self._say = say
        self._answered = time.monotonic()
        self._silent = False

    def over(self) -> bool:
        """Has the job ended?

        Raises:
            WorkerLost: it was deleted, or there has been no answer for long.
        """
        name = job_name(self._task.id)
        try:
            job = ask_object(self._cluster, "rayjob", name)
        except Unreachable as error:
            self._without_answer(name, error)
            return False
        if self._silent:
            self._say("kubectl answers again")
        self._answered, self._silent = time.monotonic(), False
        if job is None:
            if exit_code(self._task.path) is None:
                raise WorkerLost(
                    f"RayJob {name} was deleted before it ended; the same command continues from its checkpoint"
                )
            return True  # by `rlprm stop`, which has waited for the run
        self.state = _state(job)
        if self.state in ENDED:
            _keep(self._task, _code(job))
        return self.state in ENDED

    def code(self) -> int:
        """The run's exit code, once it is over."""
        code = exit_code(self._task.path)
        assert code is not None
        return code

    def _without_answer(self, name: str, error: Unreachable) -> None:
        if not self._silent:
            self._say(f"{error}; it is asked again for {SILENT_S:.0f} s, and the job goes on")
            self._silent = True
        if time.monotonic() - self._answered > SILENT_S:
            raise WorkerLost(
                f"no answer about RayJob {self._cluster.namespace}/{name} for {SILENT_S:.0f} s ({error}). It may go on: "
                f"rlprm status {self._task.id}, rlprm logs -f {self._task.id}"
            ) from error


def _stop(task: Task, cluster: KubeRayCluster) -> None:
    code = INTERRUPTED
    try:
        if _ask_to_stop(task, cluster):
            code = _wait_for_the_end(task, cluster)
    except Unreachable as error:
        raise WorkerLost(
            f"launch {task.id} was not asked to end ({error}); it goes on: rlprm stop {task.id}"
        ) from error
    except KeyboardInterrupt:
        _delete(task, cluster, code)
        raise
    _delete(task, cluster, code)


def _delete(task: Task, cluster: KubeRayCluster, code: int) -> None:
    name = job_name(task.id)
    try:
        ask(cluster, "delete", "rayjob,configmap", name, "--ignore-not-found", "--wait=false")
    except Unreachable as error:
        raise WorkerLost(
            f"RayJob {cluster.namespace}/{name} was not deleted ({error}); it may go on: rlprm stop {task.id}"
        ) from error
    _keep(task, code)
    (task.path / SUBMITTED).unlink(missing_ok=True)


def _ask_to_stop(task: Task, cluster: KubeRayCluster) -> bool:
    """Leave the file that the head program looks for; False where there is no head to leave it with.

    Raises:
        Unreachable: the cluster gives no answer.
    """
    selector = f"rlprm/launch={job_name(task.id)},ray.io/node-type=head"
    heads = ask(cluster, "get", "pods", "-l", selector, "-o", "jsonpath={.items[*].metadata.name}").split()
    file = f"{in_pod(task, cluster).folder}/{STOP}"
    for _ in range(ASK_TRIES if heads else 0):
        with suppress(Unreachable):  # a container that does not run yet has nothing to save
            ask(cluster, "exec", heads[0], "--", "touch", file)
            return True
        time.sleep(cluster.poll_s)
    return False


def _wait_for_the_end(task: Task, cluster: KubeRayCluster) -> int:
    """The exit code of a run that was asked to end."""
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline:
        with suppress(Unreachable):
            job = ask_object(cluster, "rayjob", job_name(task.id))
            if job is None:
                break
            if _state(job) in ENDED:
                return _code(job)
        time.sleep(cluster.poll_s)
    return INTERRUPTED


def _wait_until_running(watched: Watched, task: Task, cluster: KubeRayCluster, say: Say) -> None:
    name, begin, told = job_name(task.id), time.monotonic(), ""
    while not watched.over() and watched.state != "Running":
        sentence = f"{watched.state or 'not seen by the operator yet'}; {_pods(cluster, name) or 'no pods yet'}"
        if time.monotonic() - begin > cluster.wait_s:
            raise WorkerLost(
                f"RayJob {name} is not running after {cluster.wait_s:.0f} s: {sentence}. It stays and starts when it can; "
                f"rlprm stop {task.id} deletes it, rlprm logs -f {task.id} follows it. Look at its pods (kubectl -n "
                f"{cluster.namespace} describe pods -l rlprm/launch={name}), or give it more time (cluster.wait_s)"
            )
        if sentence != told:
            say(f"waiting: {sentence}")
            told = sentence
        time.sleep(cluster.poll_s)


def _pods(cluster: KubeRayCluster, name: str) -> str:
    """Which pods are not running, and why, in a line."""
    try:
        found = json.loads(ask(cluster, "get", "pods", "-l", f"rlprm/launch={name}", "-o", "json"))
    except (Unreachable, ValueError):
        return ""
    words = []
    for pod in found["items"]:
        phase = pod["status"].get("phase", "Unknown")
        reasons = [each.get("message", "") for each in pod["status"].get("conditions", []) if each["status"] == "False"]
        why = f" ({reasons[0]})" if reasons and reasons[0] and phase == "Pending" else ""
        words.append(f"{pod['metadata']['name']} {phase}{why}")
    return ", ".join(words)


def _keep(task: Task, code: int) -> int:
    """The exit code that is written down, unless another one was before."""
    kept = exit_code(task.path)
    if kept is None:
        put(task.path, EXIT, f"{code}\n")
        return code
    return kept


def _state(job: dict[str, Any]) -> str:
    return str(job.get("status", {}).get("jobDeploymentStatus", ""))


def _code(job: dict[str, Any]) -> int:
    """The run's exit code, which the operator repeats in words; 1 where it does not."""
    found = job.get("status", {})
    if found.get("jobStatus") == "SUCCEEDED":
        return 0
    words = _EXIT.search(str(found.get("message", "")))
    return int(words[1]) if words else 1
