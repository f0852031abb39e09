"""What is being done, how far it is and how long it will still take."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as LiveProgress


def duration(seconds: float) -> str:
    """Seconds as people say them.

    >>> duration(4.2), duration(65.0), duration(7260.0)
    ('4 s', '1 min 05 s', '2 h 01 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Stage:
    """One stage under way. ``advance`` may be called from any thread."""

    def __init__(self, label: str, total: int | None, unit: str, done: int, now: Callable[[], float]) -> None:
        self.label = label
        self.total = total
        self.unit = unit
        self.done = done
        self._done_before = done
        self.note = ""
        self._now = now
        self._began = now()
        self._lock = threading.Lock()
        self._changed: Callable[[], None] = lambda: None

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """``count`` more units are done; ``note`` replaces the words at the end of the line."""
        with self._lock:
            self.done += count
            if note is not None:
                self.note = note
        self._changed()

    @property
    def elapsed(self) -> float:
        """Seconds since the stage began."""
        return self._now() - self._began

    @property
    def remaining(self) -> float | None:
        """Seconds still to go at the mean pace so far; None while nothing is done or the total is not known."""
        gained = self.done - self._done_before
        if self.total is None or gained == 0:
            return None
        return self.elapsed / gained * (self.total - self.done)

    def line(self) -> str:
        """The state in one plain line, such as ``sample: 8 of 32 prompts, 4 s, about 12 s to go``."""
        parts = [duration(self.elapsed)]
        if self.total is not None:
            parts.insert(0, f"{self.done} of {self.total} {self.unit}".rstrip())
        elif self.done:
            parts.insert(0, f"{self.done} {self.unit}".rstrip())
        if self.remaining:
            parts.append(f"about {duration(self.remaining)} to go")
        if self.note:
            parts.append(self.note)
        return f"{self.label}: {', '.join(parts)}"


class Progress:
    """Live bars on a terminal; elsewhere a plain line every ``every`` seconds; nothing when ``quiet``.

    Off a terminal a stage that ends within ``patience`` seconds is never mentioned, so logs hold what somebody would
    have waited for. Stages may nest (the run, and what its step is doing) and end in any order.
    """

    def __init__(
        self, console: Console | None = None, *, quiet: bool = False, every: float = 15.0, patience: float = 5.0
    ) -> None:
        self._console = Console(stderr=True) if console is None else console
        self._quiet = quiet
        self._every = every
        self._patience = patience
        self._lock = threading.Lock()
        self._live: LiveProgress | None = None
        self._open = 0

    @contextmanager
    def stage(self, label: str, total: int | None = None, unit: str = "", done: int = 0) -> Iterator[Stage]:
        """Show ``label`` while the body runs; ``done`` of ``total`` are finished already (after a resume)."""
        stage = Stage(label, total, unit, done, time.monotonic)
        if self._quiet:
            yield stage
        elif self._console.is_terminal:
            with self._bar(stage):
                yield stage
        else:
            with self._lines(stage):
                yield stage

    def say(self, text: str) -> None:
        """One line that stays, above the bars; not shown when quiet."""
        if not self._quiet:
            self._console.print(text, highlight=False, markup=False)  # an error may hold [/brackets]

    @contextmanager
    def _bar(self, stage: Stage) -> Iterator[None]:
        with self._lock:
            if self._live is None:
                self._live = LiveProgress(
                    SpinnerColumn(),
                    TextColumn("{task.description}"),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TextColumn("{task.fields[unit]}"),
                    TimeElapsedColumn(),
                    TimeRemainingColumn(),
                    TextColumn("{task.fields[note]}"),
                    console=self._console,
                    transient=True,
                )
                self._live.start()
            live = self._live
            self._open += 1
        task = live.add_task(stage.label, total=stage.total, completed=stage.done, unit=stage.unit, note="")
        stage._changed = lambda: live.update(task, completed=stage.done, note=stage.note)
        try:
            yield
        finally:
            live.remove_task(task)
            with self._lock:
                self._open -= 1
                if self._open == 0:
                    # The cursor and the terminal's state come back even when the stage raised.
                    live.stop()
                    self._live = None

    @contextmanager
    def _lines(self, stage: Stage) -> Iterator[None]:
        ended = threading.Event()

        def talk() -> None:
            wait = self._patience
            while not ended.wait(wait):
                self.say(stage.line())
                wait = self._every

        # A thread, because the stages people wait for longest (an engine that starts) never call `advance`.
        speaker = threading.Thread(target=talk, name=f"progress: {stage.label}", daemon=True)
        speaker.start()
        try:
            yield
        finally:
            ended.set()
            speaker.join()
            if stage.elapsed >= self._patience:
                self.say(stage.line())
