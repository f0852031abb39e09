"""Grade a file of answers with a verifier, so that anybody can check the verifier against their own data."""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rlprm.errors import DataError
from rlprm.verify.pool import Job, VerifierPool, check_canaries

AHEAD = 64  # jobs read ahead per worker: enough to keep all busy while the slowest one holds the order up


def judge_file(
    verifier: Callable[..., Any] | str,
    input: Path,
    output: Path,
    *,
    workers: int,
    timeout_s: float,
    memory_mb: int,
    progress: bool = True,
    overwrite: bool = False,
) -> dict[str, int]:
    """JSON Lines ``gold``, ``prediction`` (``prompt``) -> ``verdict`` 1/0/null, ``reason``, ``seconds``, line for line.

    The file is streamed. Lines end with a line feed and nothing else. ``prompt`` defaults to "", a ``prediction`` of
    null is an empty answer, numbers stand for their text; an ``id`` is passed through. The verifier's canaries are
    judged first. The result appears under its name only when it is complete; until then it grows in
    ``<output>.partial``.

    Returns the number of lines by verdict (``right``, ``wrong``, ``between`` for an outcome strictly between, ``none``)
    and the pool's counts by kind.

    Raises:
        DataError: the input is missing, ``output`` exists and ``overwrite`` is false, or a line is unusable (file and
        line are named).
        VerifierError: the verifier cannot be loaded, or misjudges a canary.
    """
    if not input.is_file():
        raise DataError(f"{input}: no such file; expected JSON Lines with gold and prediction")
    if output.exists() and not overwrite:
        raise DataError(f"{output}: exists already; choose another output, or overwrite it on purpose")
    if output.exists() and output.samefile(input):
        raise DataError(f"{output}: is the input itself; choose another output")
    partial = output.with_name(output.name + ".partial")
    tally: collections.Counter[str] = collections.Counter(dict.fromkeys(("right", "wrong", "between", "none"), 0))
    passed: collections.deque[tuple[int, dict[str, Any]]] = collections.deque()  # bytes and id of the lines in flight
    with (
        VerifierPool(verifier, workers=workers, timeout_s=timeout_s, memory_mb=memory_mb) as pool,
        _bar(progress) as bar,
        partial.open("w", encoding="utf-8") as sink,
    ):
        check_canaries(pool)
        before = pool.counts
        task = bar.add_task(f"judging {input.name}", total=input.stat().st_size)
        for verdict in pool.stream(_jobs(input, passed), window=AHEAD * workers):
            length, extra = passed.popleft()
            tally[_label(verdict.outcome)] += 1
            row = {**extra, "verdict": _plain(verdict.outcome), "reason": verdict.reason}
            sink.write(json.dumps({**row, "seconds": round(verdict.seconds, 6)}, ensure_ascii=True) + "\n")
            bar.advance(task, length)
        counts = {kind: count - before[kind] for kind, count in pool.counts.items()}
    os.replace(partial, output)
    return {**tally, **counts}


def _jobs(path: Path, passed: collections.deque[tuple[int, dict[str, Any]]]) -> Iterator[Job]:
    with path.open("rb") as lines:  # bytes are split on b"\n" only; a text file would also split on U+2028 and others
        for number, line in enumerate(lines, start=1):
            row = _row(line, f"{path}, line {number}")
            passed.append((len(line), {"id": row["id"]} if "id" in row else {}))
            yield row["gold"], row["prediction"], row["prompt"]


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); expected one object per line") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: found a {type(row).__name__}; expected an object with gold and prediction")
    for name in ("gold", "prediction"):
        if name not in row:
            raise DataError(f"{where}: no {name!r}; found {sorted(row)}; rename the field or add it")
    texts = {"prompt": "", **row, "prediction": "" if row["prediction"] is None else row["prediction"]}
    for name in ("gold", "prediction", "prompt"):
        value = texts[name]
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise DataError(f"{where}: {name} is {json.dumps(value)[:60]}; expected a string or a number")
    return {**row, **{name: str(texts[name]) for name in ("gold", "prediction", "prompt")}}


def _label(outcome: float | None) -> str:
    if outcome is None:
        return "none"
    return {1.0: "right", 0.0: "wrong"}.get(outcome, "between")


def _plain(outcome: float | None) -> int | float | None:
    return int(outcome) if outcome is not None and outcome.is_integer() else outcome


def _bar(shown: bool) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), disable=not shown)
