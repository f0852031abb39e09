"""The runs of an ablation, in this process or on several worker processes that take the next run when they are free."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from rlprm.errors import ConfigError, DataError
from rlprm.run.ablation import Planned, run_one, write_failure
from rlprm.run.kept import Kept, sampling_key
from rlprm.run.progress import Progress, duration
from rlprm.run.stopping import Stopping
from rlprm.run.training import train
from rlprm.verify.worker import die_with

END_S = 60.0  # a worker that was told to end may take so long to stop its engines


def run_all(
    todo: Sequence[Planned],
    logs: Path,
    *,
    workers: int,
    checkpoints: str,
    progress: Progress,
    after: Callable[[], Any],
) -> dict[str, str]:
    """Run everything in ``todo``; what failed, with its error. ``after`` is called after each run.

    SIGTERM lets the run of this process finish its step and save; workers and what stands between runs end at once, as
    with Ctrl-C. What is finished stays. No worker outlives this process.

    Raises:
        Stopped: after SIGTERM.
    """
    talk = _Talk(total=len(todo), progress=progress, after=after)
    with sigterm_exits():
        if workers == 1 or len(todo) < 2:
            _in_turn(todo, logs, checkpoints, progress, talk)
        else:
            _side_by_side(list(todo), logs, min(workers, len(todo)), checkpoints, talk)
    return talk.failed


@contextmanager
def sigterm_exits() -> Iterator[None]:
    """SIGTERM raises SystemExit in the block, so that what has been started is stopped.

    Afterwards the handler from before is back. Only the main thread can have handlers; in another one nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _exit(number: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # another one must not break off the stopping
    raise SystemExit(128 + number)


class _Talk:
    """What is said of runs that begin and end, and which of them failed."""

    def __init__(self, *, total: int, progress: Progress, after: Callable[[], Any]) -> None:
        self.failed: dict[str, str] = {}
        self._total = total
        self._begun = self._done = 0
        self._progress = progress
        self._after = after
        self._after_failed = False
        self._start = time.monotonic()

    def begins(self, run: Planned) -> None:
        self._begun += 1
        self._progress.say(f"run {self._begun} of {self._total}: {run.label}")

    def ended(self, run: Planned, error: str | None) -> None:
        self._done += 1
        if error is not None:
            self.failed[run.label] = error
            self._progress.say(f"{run.label} failed: {error}")
        left = self._total - self._done
        if left:
            pace = (time.monotonic() - self._start) / self._done
            self._progress.say(f"{self._done} of {self._total} runs ended, about {duration(pace * left)} to go")
        try:
            self._after()
        except (OSError, DataError) as error:  # a full disk: the other runs may still finish
            if not self._after_failed:
                self._progress.say(f"the report could not be written ({error}); the runs go on")
            self._after_failed = True


def _in_turn(todo: Sequence[Planned], logs: Path, checkpoints: str, progress: Progress, talk: _Talk) -> None:
    with Stopping(progress.say).on_sigterm() as stopping, Kept(logs, progress) as kept:
        for run in todo:
            talk.begins(run)
            error = run_one(
                run,
                lambda config, made: train(config, made, progress, kept, stopping=stopping),
                checkpoints=checkpoints,
            )
            talk.ended(run, error)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Worker:
    process: Any
    pipe: Connection


def _side_by_side(pending: list[Planned], logs: Path, count: int, checkpoints: str, talk: _Talk) -> None:
    """One run at a time on each worker; a worker that dies takes its run with it, and another takes its place."""
    devices = _devices(pending, count)
    busy: dict[_Worker, tuple[Planned, int]] = {}
    try:
        for place in range(count):
            _next(_start_worker(logs, place, devices[place], checkpoints), place, pending, busy, talk, None)
        while busy:
            pipes: list[Any] = [worker.pipe for worker in busy]
            for pipe in wait(pipes):
                worker = next(each for each in busy if each.pipe is pipe)
                run, place = busy[worker]
                alive, error = _answer(worker, run)
                talk.ended(run, error)
                if alive:
                    _next(worker, place, pending, busy, talk, run)
                    continue
                del busy[worker]
                if pending:
                    _next(_start_worker(logs, place, devices[place], checkpoints), place, pending, busy, talk, None)
    except SystemExit:  # SIGTERM, which has reached this process alone
        for worker in busy:
            worker.process.terminate()
        raise
    finally:
        for worker in busy:
            worker.pipe.close()  # after the run it is at, or at once where Ctrl-C has reached it too
        for worker in busy:
            _end(worker)


def _next(
    worker: _Worker,
    place: int,
    pending: list[Planned],
    busy: dict[_Worker, tuple[Planned, int]],
    talk: _Talk,
    last: Planned | None,
) -> None:
    """Give the worker a run, one that can use the engines it has if there is one; or let it end."""
    if not pending:
        worker.pipe.close()
        _end(worker)
        del busy[worker]
        return
    engines = None if last is None else sampling_key(last.config)
    fitting = [run for run in pending if sampling_key(run.config) == engines] or pending
    run = fitting[0]
    pending.remove(run)
    talk.begins(run)
    busy[worker] = run, place
    with suppress(OSError):  # it died meanwhile: its pipe will say so
        worker.pipe.send(run)


def _answer(worker: _Worker, run: Planned) -> tuple[bool, str | None]:
    """Is the worker still there, and how its run ended."""
    try:
        return True, worker.pipe.recv()
    except (EOFError, OSError):
        worker.process.join()
        return False, write_failure(run, f"its worker process ended with exit code {worker.process.exitcode}")


def _end(worker: _Worker) -> None:
    """Wait until it has stopped its engines, but not for ever."""
    for stop in (worker.process.terminate, worker.process.kill):
        worker.process.join(END_S)
        if worker.process.is_alive():
            stop()
    worker.process.join()


def _start_worker(logs: Path, place: int, devices: str | None, checkpoints: str) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(os.getpid(), theirs, logs / f"worker{place}", devices, checkpoints))
    process.start()
    theirs.close()  # ours alone: when the worker dies, the pipe ends
    return _Worker(process=process, pipe=ours)


def _serve(parent: int, pipe: Connection, logs: Path, devices: str | None, checkpoints: str) -> None:
    """A worker: runs as they come, until the pipe ends. It ends with its parent, which may be killed at any time."""
    with sigterm_exits():
        die_with(parent, signal.SIGTERM)
        _runs(pipe, logs, devices, checkpoints)


def _runs(pipe: Connection, logs: Path, devices: str | None, checkpoints: str) -> None:
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    progress = Progress(quiet=True)
    try:
        with Kept(logs, progress) as kept:
            while True:
                run: Planned = pipe.recv()
                pipe.send(
                    run_one(run, lambda config, made: train(config, made, progress, kept), checkpoints=checkpoints)
                )
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return


def _devices(runs: Sequence[Planned], count: int) -> list[str | None]:
    """The GPUs that each worker may see where it starts a Ray of its own, so that no two use the same.

    Raises:
        ConfigError: there are too few.
    """
    own = [run.config.placement for run in runs if run.config.placement.ray_address is None]
    if all(placement.device == "cpu" for placement in own):
        return [None] * count
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = [str(each) for each in range(torch.cuda.device_count())] if given is None else given.split(",")
    share = len(visible) // count
    if share == 0:
        raise ConfigError(f"--parallel {count} with {len(visible)} GPUs; expected at least one for each worker")
    return [",".join(visible[place * share : (place + 1) * share]) for place in range(count)]
