"""SIGTERM to a run: it finishes its step, saves and ends. A second one, or Ctrl-C, ends it at once.

>>> said = []
>>> stopping = Stopping(said.append)
>>> with stopping.on_sigterm(), stopping.steps(3):
...     signal.raise_signal(signal.SIGTERM)
...     stopping.asked
True
>>> said
['asked to end: finishing step 3, then saving (asked again, or with Ctrl-C, it ends at once)']
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rlprm.errors import Stopped


class Stopping:
    """Was the run asked to end? Only while its steps go on there is something to finish and to save.

    At all other times, and for whoever asks twice, SIGTERM does what it did before :meth:`on_sigterm`, or else raises
    KeyboardInterrupt.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.asked = False
        self._say = say
        self._step: int | None = None  # the one under way
        self._before: object = None
        self._pid = os.getpid()
        self._words = ""
        self._wake = threading.Event()

    @contextmanager
    def on_sigterm(self) -> Iterator[Stopping]:
        """SIGTERM asks in the block. Only the main thread can have handlers; in another one nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        self._before = signal.signal(signal.SIGTERM, self._signalled)
        # a handler may not print: it may have come in the middle of printing
        speaker = threading.Thread(target=self._speak, name="rlprm-stopping", daemon=True)
        speaker.start()
        try:
            yield self
        finally:
            if signal.getsignal(signal.SIGTERM) == self._signalled:
                signal.signal(signal.SIGTERM, signal.SIG_DFL if self._before is None else self._before)  # type: ignore[arg-type]
            self._wake.set()
            speaker.join()

    @contextmanager
    def steps(self, first: int) -> Iterator[None]:
        """The run's steps, from ``first`` on."""
        self._step = first
        try:
            yield
        finally:
            self._step = None

    def refuse(self, what: str) -> None:
        """Let nothing begin after the run before has been asked to end.

        Raises:
            Stopped: it has been.
        """
        if self.asked:
            raise Stopped(f"stopped before {what}")

    def over(self, step: int) -> None:
        """The next step begins."""
        self._step = step + 1

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a process that was forked from this one has no steps
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self.asked or self._step is None:
            if callable(self._before):
                self._before(number, frame)
            else:
                raise KeyboardInterrupt
        else:
            self.asked = True
            self._words = (
                f"asked to end: finishing step {self._step}, then saving (asked again, or with Ctrl-C, it ends at once)"
            )
            self._wake.set()

    def _speak(self) -> None:
        self._wake.wait()
        if self._words:
            self._say(self._words)


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM is Ctrl-C in the block, so that what has been started is stopped; only the main thread can have that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
