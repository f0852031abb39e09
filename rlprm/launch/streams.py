"""Reading a log that is being written."""

from __future__ import annotations

import codecs
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

POLL_S = 0.3


def follow(path: Path, ended: Callable[[], bool]) -> Iterator[str]:
    """What stands in the file and what is added to it, until ``ended``; a file that is not there yet is waited for.

    >>> import tempfile
    >>> log = Path(tempfile.mkdtemp()) / "log"
    >>> _ = log.write_text("one step\\n")
    >>> list(follow(log, lambda: True))
    ['one step\\n']
    """
    position = 0
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    while True:
        last = ended()  # asked before the last reading, so that what was written in between is not missed
        if path.is_file():
            with path.open("rb") as file:
                file.seek(position)
                while data := file.read(1 << 16):
                    position += len(data)
                    if text := decoder.decode(data):
                        yield text
        if last:
            return
        time.sleep(POLL_S)


def forward(process: subprocess.Popen[bytes], write: Callable[[bytes], None]) -> threading.Thread:
    """Hand on what a program prints, as it comes."""

    def run() -> None:
        assert process.stdout is not None
        with suppress(ValueError, OSError):
            while data := os.read(process.stdout.fileno(), 1 << 16):
                write(data)
        process.stdout.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread
