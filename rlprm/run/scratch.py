"""A folder for the logs of commands that have no run folder of their own."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def scratch_logs(command: str) -> Iterator[Path]:
    """Removed when the block succeeds; kept after an error, whose message names it."""
    folder = Path(tempfile.mkdtemp(prefix=f"rlprm-{command}-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
