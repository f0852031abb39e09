"""Where the time of a step went."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Clock:
    """Wall-clock seconds per named stage, as ``timing_s/{stage}``; the driver's stage ``step`` holds the others.

    A stage entered several times counts with its sum. Stages may nest, and may run in several threads at once; each
    is counted in full, so the parts may sum to more than the step. A stage that is still open when the metrics are
    collected counts towards the collection after it ends.

    >>> ticks = iter([0.0, 1.0, 3.0, 4.0])
    >>> clock = Clock(now=lambda: next(ticks))
    >>> with clock.stage("step"):
    ...     with clock.stage("generate"):
    ...         pass
    >>> clock.collect()
    {'timing_s/generate': 2.0, 'timing_s/step': 4.0}
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to ``name``, also when the body raises."""
        began = self._now()
        try:
            yield
        finally:
            self.add(name, self._now() - began)

    def add(self, name: str, seconds: float) -> None:
        """Add ``seconds`` that were measured elsewhere (by an actor, say) to ``name``."""
        with self._lock:
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def collect(self) -> dict[str, float]:
        """The seconds of the stages that ended since the last ``collect``, as metrics."""
        with self._lock:
            ended, self._seconds = self._seconds, {}
        return {f"timing_s/{name}": seconds for name, seconds in ended.items()}
