"""A prompt template that takes its process down."""

from __future__ import annotations

import multiprocessing
import os
import signal
from typing import Any


def killing(tokenizer: Any, *, format: str, bos: str) -> Any:
    """As if the system had run out of memory; in a worker process only, never in that of the tests."""
    if multiprocessing.parent_process() is None:
        raise RuntimeError("this template belongs into a worker process")
    os.kill(os.getpid(), signal.SIGKILL)
