"""Prompt templates that take their process down, or keep it where it is."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any


def killing(tokenizer: Any, *, format: str, bos: str) -> Any:
    """As if the system had run out of memory; in a worker process only, never in that of the tests."""
    if multiprocessing.parent_process() is None:
        raise RuntimeError("this template belongs into a worker process")
    os.kill(os.getpid(), signal.SIGKILL)


def waiting(tokenizer: Any, *, format: str, bos: str) -> Any:
    """A run that goes on and on; the file ``<process id>`` in the working directory says that it was ended in good order."""
    own = Path(str(os.getpid()))
    own.write_text("waits")
    try:
        time.sleep(600.0)
    finally:
        own.write_text("ended")
