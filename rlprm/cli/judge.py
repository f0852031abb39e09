"""``rlprm judge``: grade a file of answers with a verifier, so that anybody can check it against their own data.

Nothing here imports torch or Ray: a command that grades a file of ten lines must not take longer to start than to grade.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rlprm.cli.compose import composed, groups
from rlprm.config import JudgeConfig, validated
from rlprm.errors import ConfigError, DataError
from rlprm.parts import locate
from rlprm.verify.pool import Job, VerifierPool, check_canaries

LABELS = ("right", "wrong", "between", "none")
OWN_HELP = True  # argparse's: there is one group
AHEAD = 64  # jobs read ahead per worker: enough to keep all busy while the slowest one holds the order up


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `rlprm judge`."""
    known = groups()["verifier"]
    parser.add_argument(
        "--verifier", required=True, metavar="NAME", help=f"{', '.join(known)}: options of conf/verifier/"
    )
    parser.add_argument("--input", type=Path, required=True, help="JSON Lines with gold and prediction (prompt, id)")
    parser.add_argument("--output", type=Path, required=True, help="JSON Lines with verdict 1/0/null, reason, seconds")
    parser.add_argument("overrides", nargs="*", metavar="verifier.KEY=VALUE", help="for example verifier.workers=4")
    parser.add_argument("--config-dir", type=Path, help="a folder of your own groups and options")
    parser.add_argument("--cfg", action="store_true", help="print the resolved configuration and its origins")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def run(options: argparse.Namespace) -> int:
    """Grade the file and say how many lines got which verdict."""
    for override in options.overrides:
        if override.startswith("verifier="):
            raise ConfigError(f"{override}: the verifier is named by --verifier; leave this out")
    configuration = composed("judge", [f"verifier={options.verifier}", *options.overrides], options.config_dir)
    if options.cfg:
        print(configuration.annotated())
        return 0
    config: JudgeConfig = validated(JudgeConfig, configuration.values)
    section = config.verifier
    settings = {key: value for key, value in section.function.items() if not key.startswith("_")}
    counts = judge_file(
        functools.partial(locate(section.function["_target_"]), **settings),
        options.input,
        options.output,
        workers=section.workers,
        timeout_s=section.timeout_s,
        memory_mb=section.memory_mb,
        progress=not options.quiet,
        overwrite=options.overwrite,
    )
    for line in summary(counts, options.output):
        print(line)
    lines = sum(counts[label] for label in LABELS)
    if counts["none"] > section.max_error_fraction * lines:
        share = f"{counts['none']} of {lines} answers got no verdict, more than verifier.max_error_fraction"
        print(f"{share}={section.max_error_fraction}: with such data a training run would end", file=sys.stderr)
    return 0


def summary(counts: Mapping[str, int], output: Path) -> list[str]:
    """The counts in words.

    >>> summary({"right": 2, "wrong": 1, "between": 0, "none": 1, "timeouts": 1, "memory": 0, "crashes": 0, "errors": 0},
    ...         Path("verdicts.jsonl"))
    ['4 answers: 2 right, 1 wrong, 1 without verdict (1 timeouts)', 'wrote verdicts.jsonl']
    """
    words = [f"{counts['right']} right", f"{counts['wrong']} wrong"]
    words += [f"{counts['between']} between"] if counts["between"] else []
    causes = ", ".join(f"{counts[kind]} {kind}" for kind in ("timeouts", "memory", "crashes", "errors") if counts[kind])
    words.append(f"{counts['none']} without verdict" + (f" ({causes})" if causes else ""))
    return [f"{sum(counts[label] for label in LABELS)} answers: {', '.join(words)}", f"wrote {output}"]


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
    if not output.parent.is_dir():
        raise DataError(f"{output}: there is no folder {output.parent}; make it first")
    partial = output.with_name(output.name + ".partial")
    tally: collections.Counter[str] = collections.Counter(dict.fromkeys(LABELS, 0))
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
