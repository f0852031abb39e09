"""What an offline run of Weights & Biases has written, as one piece: the file is cut into blocks, words and all."""

from __future__ import annotations

from pathlib import Path

BLOCK = 32768
FILE_HEADER = RECORD_HEADER = 7


def contents(file: Path) -> bytes:
    """The records of a ``.wandb`` file (LevelDB's log format), end to end."""
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
