"""What an offline run of Weights & Biases has written, as one piece: the file is cut into blocks, words and all."""

from __future__ import annotations

import time
from pathlib import Path

FLUSHED_S = 20.0  # W&B's own process may write the file a moment after the run has been finished
BLOCK = 32768
FILE_HEADER = RECORD_HEADER = 7


def contents(file: Path) -> bytes:
    """The records of a ``.wandb`` file (LevelDB's log format), end to end."""
    deadline = time.monotonic() + FLUSHED_S
    while file.stat().st_size <= FILE_HEADER and time.monotonic() < deadline:
        time.sleep(0.05)
    data = file.read_bytes()
    place, found = FILE_HEADER, []
    while place + RECORD_HEADER <= len(data):
        left = BLOCK - place % BLOCK
        if left < RECORD_HEADER:
            place += left  # filled up with zeros
            continue
        length = int.from_bytes(data[place + 4 : place + 6], "little")
        found.append(data[place + RECORD_HEADER : place + RECORD_HEADER + length])
        place += RECORD_HEADER + length
    return b"".join(found)
