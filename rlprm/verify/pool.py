"""Run a verifier in killable processes: wall-clock limit, memory limit, and a third verdict when it fails.

One thread of this process owns one child (:mod:`rlprm.verify.worker`). The thread writes a job, waits on the pipe with
a deadline and, when it passes, kills the child and starts another. Threads that only wait on a pipe never hold up the
interpreter, so the pool works the same from the main thread, another thread, asyncio and a Ray actor. Nothing is forked
from this process with Python code in between (``subprocess`` starts a fresh interpreter), and nothing is unpickled.
"""

from __future__ import annotations

import collections
import functools
import importlib
import json
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Any

from rlprm.errors import ConfigError, VerifierError
from rlprm.roles import Verdict
from rlprm.verify.child import Child, ChildDied, Overdue

Job = tuple[str, str, str]  # gold, response, prompt
START_LIMIT_S = 120.0  # a cold file system can make the first import slow; a verifier that needs longer is broken
KINDS = ("judged", "timeouts", "memory", "crashes", "errors", "closed")


class VerifierPool:
    """Every submitted job gets exactly one Verdict; ``outcome`` is None where the verifier gave none.

    ``workers`` processes, ``timeout_s`` seconds of wall clock per job, ``memory_mb`` MiB of address space per process.
    The verifier is a dotted path, an importable function, or a ``functools.partial`` of one with JSON-like keywords.

    ``counts`` holds finished jobs by kind: ``judged``; ``timeouts``; ``memory`` (limit reached); ``crashes`` (the
    process died); ``errors`` (an exception, or a result that is none); ``closed`` (never run). ``restarts`` is beside
    them.

    >>> with VerifierPool("rlprm.verify.exact.verify", workers=1, timeout_s=5.0, memory_mb=512) as pool:
    ...     [verdict.outcome for verdict in pool.judge_many([("7", "7", ""), ("7", "8", "")])]
    [1.0, 0.0]

    Raises:
        ConfigError: a limit is not positive, or the verifier cannot be named by a dotted path.
        VerifierError: the verifier cannot be loaded inside a worker.
    """

    def __init__(self, verifier: Callable[..., Any] | str, *, workers: int, timeout_s: float, memory_mb: int) -> None:
        for name, value in (("workers", workers), ("timeout_s", timeout_s), ("memory_mb", memory_mb)):
            if not value > 0:
                raise ConfigError(f"{name} is {value}; expected more than 0")
        self.verifier, self._kwargs = name_of(verifier)
        self._timeout_s, self._memory_mb = timeout_s, memory_mb
        self._jobs: queue.SimpleQueue[tuple[Future[Verdict], Job] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._children: dict[int, Child] = {}
        self._counts = dict.fromkeys((*KINDS, "restarts"), 0)
        self._started: queue.SimpleQueue[str] = queue.SimpleQueue()  # "" or why the first start failed, per worker
        self._threads = [
            threading.Thread(target=self._serve, args=(slot,), name=f"rlprm-verify-{slot}", daemon=True)
            for slot in range(workers)
        ]
        for thread in self._threads:
            thread.start()
        try:
            failure = self._started.get()
        except BaseException:  # Ctrl-C while the first worker loads
            self.close()
            raise
        if failure:
            self.close()
            raise VerifierError(f"verifier {self.verifier} cannot be loaded in a worker: {failure}")

    def submit(self, gold: str, response: str, prompt: str) -> Future[Verdict]:
        """Queue one job; in asyncio, ``await asyncio.wrap_future(pool.submit(...))``.

        Raises:
            VerifierError: the pool is closed.
        """
        future: Future[Verdict] = Future()
        with self._lock:
            if self._closed:
                raise VerifierError("the verifier pool is closed; submit jobs before close()")
            self._jobs.put((future, (gold, response, prompt)))
        return future

    def stream(self, jobs: Iterable[Job], window: int) -> Iterator[Verdict]:
        """Verdicts in the order of ``jobs``, reading at most ``window`` jobs ahead."""
        ahead: collections.deque[Future[Verdict]] = collections.deque()
        for job in jobs:
            ahead.append(self.submit(*job))
            if len(ahead) >= window:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def judge_many(self, jobs: Iterable[Job]) -> list[Verdict]:
        """All verdicts, in the order of ``jobs``."""
        futures = [self.submit(*job) for job in jobs]
        return [future.result() for future in futures]

    @property
    def counts(self) -> dict[str, int]:
        """Finished jobs by kind, and ``restarts`` of worker processes."""
        with self._lock:
            return dict(self._counts)

    def pids(self) -> list[int]:
        """Process ids of the live workers."""
        with self._lock:
            return [child.pid for child in self._children.values()]

    def close(self) -> None:
        """Kill the workers and end the threads; jobs not finished get a Verdict without outcome. Idempotent."""
        with self._lock:
            first, self._closed = not self._closed, True
            children = list(self._children.values())
        if first:
            for _ in self._threads:
                self._jobs.put(None)
        for child in children:
            child.kill()
        for thread in self._threads:
            if thread is not threading.current_thread():  # a future's callback may close the pool
                thread.join()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # The rest runs in the pool's own threads. Each thread lives as long as the pool, which matters: the kernel ties a
    # child's parent-death signal to the thread that started it.

    def _serve(self, slot: int) -> None:
        child, failure = self._start(slot)
        self._started.put(failure)
        while (item := self._jobs.get()) is not None:
            future, job = item
            if not future.set_running_or_notify_cancel():
                continue
            if child is None and not self._closed:
                child, failure = self._start(slot)
            kind, verdict, keep = self._judge(child, failure, job)
            if child is not None and not keep:
                self._stop(slot, child)
                child = None
            # Counted before the future is resolved: who holds all verdicts reads complete counts.
            self._count(kind)
            future.set_result(verdict)
            if child is None and not self._closed:  # start at once, not when the next job is already waiting
                self._count("restarts")
                child, failure = self._start(slot)
        if child is not None:
            self._stop(slot, child)

    def _judge(self, child: Child | None, failure: str, job: Job) -> tuple[str, Verdict, bool]:
        started = time.monotonic()

        def verdict(
            kind: str, outcome: float | None, reason: str, steps: list[int] | None, keep: bool
        ) -> tuple[str, Verdict, bool]:
            seconds = time.monotonic() - started
            labels = None if steps is None else tuple(steps)
            return kind, Verdict(outcome=outcome, reason=reason, seconds=seconds, steps=labels), keep

        if self._closed:
            return verdict("closed", None, "the pool was closed before this job ran", None, True)
        if child is None:
            return verdict("crashes", None, f"no worker could be started: {failure}", None, False)
        try:
            found = child.ask(job, started + self._timeout_s)
        except Overdue:
            return verdict("timeouts", None, f"timeout after {self._timeout_s:g} s", None, False)
        except ChildDied as death:
            if self._closed:
                return verdict("closed", None, "the pool was closed while this job ran", None, False)
            return verdict("crashes", None, f"worker process died: {death}", None, False)
        # A process that has eaten half its memory may fail the next, innocent job: replace it.
        keep = found["kind"] != "memory" and found["rss_mb"] < self._memory_mb / 2
        return verdict(found["kind"], found["outcome"], found["reason"], found["steps"], keep)

    def _start(self, slot: int) -> tuple[Child | None, str]:
        # Under the lock, so that close() sees every child that was ever started.
        with self._lock:
            if self._closed:
                return None, "the pool is closed"
            try:
                child = Child(self.verifier, self._kwargs, self._memory_mb)
            except OSError as error:
                return None, f"{type(error).__name__}: {error}"
            self._children[slot] = child
        failure = child.wait_ready(time.monotonic() + START_LIMIT_S)
        if failure:
            self._stop(slot, child)
            return None, failure
        return child, ""

    def _stop(self, slot: int, child: Child) -> None:
        child.kill()
        child.reap()
        with self._lock:
            self._children.pop(slot, None)

    def _count(self, kind: str) -> None:
        with self._lock:
            self._counts[kind] += 1


def name_of(verifier: Callable[..., Any] | str) -> tuple[str, str]:
    """Dotted path and JSON keywords of a verifier, the only form in which it reaches another process.

    >>> from rlprm.verify import exact
    >>> name_of(functools.partial(exact.verify, casefold=True))
    ('rlprm.verify.exact.verify', '{"casefold": true}')

    Raises:
        ConfigError: a lambda, a nested function, a bound method, positional arguments or keywords that are not JSON.
    """
    if isinstance(verifier, str):
        path, kwargs = verifier, {}
    else:
        function, kwargs = verifier, {}
        if isinstance(verifier, functools.partial):
            function, kwargs = verifier.func, verifier.keywords
            if verifier.args:
                raise ConfigError(f"verifier {verifier!r} binds positional arguments; name its options by keyword")
        module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
        path = f"{module}.{name}"
        if not module or module == "__main__" or not name.isidentifier():
            raise ConfigError(
                f"verifier {function!r} has no dotted path that another process can import; "
                "define it at the top level of a module"
            )
    if "." not in path:
        raise ConfigError(f"verifier {path!r} is not a dotted path; expected e.g. rlprm.verify.math.verify")
    try:
        return path, json.dumps(kwargs, ensure_ascii=True)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"verifier {path} has options that are not plain data ({error}); use YAML values") from error


def check_canaries(pool: VerifierPool) -> int:
    """Judge the verifier module's ``CANARIES`` (gold, response, expected outcome) in the pool; how many there were.

    A verifier that fails on every answer looks like a policy that is always wrong; a pair with a known answer tells
    them apart.

    Raises:
        VerifierError: a canary got another outcome than the one it declares, or none.
    """
    failures = failed_canaries(pool)
    if failures:
        raise VerifierError(f"{failures[0]}. Check its options and libraries")
    return len(_canaries(pool))


def failed_canaries(pool: VerifierPool) -> list[str]:
    """What the verifier says of each canary that it judges otherwise than declared, in words."""
    canaries = _canaries(pool)
    verdicts = pool.judge_many((gold, response, "") for gold, response, _ in canaries)
    return [
        f"verifier {pool.verifier} judged the canary gold={gold!r}, response={response!r} as {verdict.outcome} "
        f"({verdict.reason}); expected {expected}"
        for (gold, response, expected), verdict in zip(canaries, verdicts, strict=True)
        if verdict.outcome != expected
    ]


def _canaries(pool: VerifierPool) -> list[tuple[str, str, float]]:
    module = importlib.import_module(pool.verifier.rpartition(".")[0])
    return list(getattr(module, "CANARIES", ()))
