"""Readers: every kind of data set becomes a list of :class:`Row`, and a bad row is an error that says where it is.

Nothing here executes code from a data set: no pickle, no remote code. The network is used by :func:`hub` alone, and
only when it is told to download.
"""

from __future__ import annotations

import glob
import gzip
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from rlprm.errors import ConfigError, DataError

GZIP_MAGIC = b"\x1f\x8b"
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One question with the answer the verifier compares with. ``source`` says where it was read: ``file:line``."""

    id: str  # unique and stable within its data set
    question: str
    gold: str | None  # None: the data set has none; such a row makes no prompt and is counted
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which columns hold what: ``gold = last match of gold_pattern in answer``, without the characters of gold_remove.

    A column name with dots that is no column itself reaches into nested values: ``reward_model.ground_truth``,
    ``prompt.0.content``. Without ``id`` a row is named by its position, counted from 0.

    >>> gsm8k = Columns(
    ...     question="question",
    ...     answer="answer",
    ...     gold_pattern=r"#### (.+)$",
    ...     gold_remove=",",
    ...     missing_gold="refuse",
    ...     id=None,
    ... )
    >>> gsm8k.gold("He has 900 + 100 = 1,000.\\n#### 1,000", "train.jsonl:1")
    '1000'

    Raises:
        ConfigError: a pattern that does not compile or has not exactly one group.
    """

    question: str
    answer: str
    gold_pattern: str | None  # regular expression with one group; None: the whole answer is the gold
    gold_remove: str  # each of these characters is dropped from the gold, e.g. "," for thousands; "" drops none
    missing_gold: Literal["refuse", "drop"]  # a row without a gold answer is an error, or is left out and counted
    id: str | None

    def __post_init__(self) -> None:
        if self.gold_pattern is None:
            return
        try:
            groups = re.compile(self.gold_pattern).groups
        except re.error as error:
            raise ConfigError(f"gold_pattern {self.gold_pattern!r} is not a regular expression: {error}") from error
        if groups != 1:
            raise ConfigError(
                f"gold_pattern {self.gold_pattern!r} has {groups} groups; expected exactly one, around the gold "
                "(write other groups as (?:...))"
            )

    def gold(self, answer: Any, where: str) -> str | None:
        """The gold answer inside ``answer``, stripped of white space; the last match counts.

        Raises:
            DataError: there is none and ``missing_gold`` is ``refuse``, or the answer is neither text nor a number.
        """
        text = "" if answer is None else plain_text(answer, self.answer, where)
        found = [text] if self.gold_pattern is None else re.findall(self.gold_pattern, text)
        gold = found[-1].translate({ord(character): None for character in self.gold_remove}).strip() if found else ""
        if gold:
            return gold
        if self.missing_gold == "drop":
            return None
        reason = "is empty" if found else f"has nothing that gold_pattern {self.gold_pattern!r} matches"
        ending = "null" if answer is None else repr(text[-60:])
        raise DataError(
            f"{where}: the answer in column {self.answer!r} {reason}; it ends in {ending}. Correct the pattern or the "
            "row, or set missing_gold to drop"
        )

    def row(self, record: Mapping[str, Any], index: int, where: str) -> Row:
        """The :class:`Row` of one record."""
        question = lookup(record, self.question, where)
        if not isinstance(question, str) or not question.strip():
            raise DataError(f"{where}: column {self.question!r} holds {question!r:.60}; expected a text, not empty")
        return Row(
            id=str(index) if self.id is None else plain_text(lookup(record, self.id, where), self.id, where),
            question=plain_text(question, self.question, where),
            gold=self.gold(lookup(record, self.answer, where), where),
            source=where,
        )

    def roots(self, found: Sequence[str], where: str) -> list[str]:
        """The top-level columns to read out of those ``found``, so that wide tables are not read whole."""
        wanted = [column for column in (self.question, self.answer, self.id) if column is not None]
        roots = [column if column in found else column.split(".")[0] for column in wanted]
        for column, root in zip(wanted, roots, strict=True):
            if root not in found:
                raise missing_column(column, found, where)
        return list(dict.fromkeys(roots))


@runtime_checkable
class TaskSource(Protocol):
    """A procedural task: a fixed number of (question, gold) pairs, the same for the same index every time."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[str, str]: ...


def jsonl(path: str, *, columns: Columns) -> list[Row]:
    """One JSON object a line, plain or gzip (told by its first bytes); ``path`` may be a pattern such as ``train-*``.

    Lines end at ``\\n`` and nowhere else: texts hold U+2028 and other characters at which ``str.splitlines`` would cut.

    Raises:
        DataError: no such file, a line that is not a JSON object, columns that are not there, no rows, equal ids.
    """
    return collect(json_records(path), columns, path)


def parquet(path: str, *, columns: Columns) -> list[Row]:
    """Rows of a Parquet file, or of all files that match ``path``, in the order of their names.

    Raises:
        DataError: no such file, not Parquet, columns that are not there, no rows, equal ids.
    """
    return collect(parquet_records(path, columns), columns, path)


def on_disk(path: str, *, split: str | None, columns: Columns) -> list[Row]:
    """Rows of a folder that Hugging Face ``Dataset.save_to_disk`` wrote; ``split`` chooses from a ``DatasetDict``.

    Raises:
        DataError: no such folder, not such a folder, a split or column that is not there, no rows, equal ids.
    """
    if not Path(path).is_dir():
        raise DataError(f"{path} is not a folder; expected one written by datasets' save_to_disk")
    import datasets  # here and not above: it takes a second to import and most runs read JSONL

    try:
        found = datasets.load_from_disk(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read as a folder written by datasets' save_to_disk: {error}") from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise DataError(f"{path} has no split {split!r}; splits found: {', '.join(sorted(found))}")
        return collect(table_records(found[split], columns, f"{path}[{split}]"), columns, f"{path}[{split}]")
    if split is not None:
        raise DataError(f"{path} is a single data set without splits; set split to null instead of {split!r}")
    return collect(table_records(found, columns, path), columns, path)


def hub(
    name: str, *, config_name: str | None, split: str, revision: str | None, download: bool, columns: Columns
) -> list[Row]:
    """Rows of the Hugging Face hub data set ``owner/name``; with ``download`` false only what is cached already.

    ``HF_HUB_OFFLINE=1`` wins over ``download``. Pin ``revision`` (a commit): a data set that changes on the hub makes
    a run impossible to resume.

    Raises:
        DataError: not cached and not allowed to download, not found, a split or column that is not there, no rows.
    """
    if HUB_NAME.fullmatch(name) is None or Path(name).exists():
        raise DataError(f"{name!r} is a local path or no hub name; expected owner/name (files have other readers)")
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or not download
    try:
        found = datasets.load_dataset(name, config_name, split=split, revision=revision)
    except (OSError, ValueError, RuntimeError) as error:
        todo = (
            "check the name, split and revision"
            if not datasets.config.HF_HUB_OFFLINE
            else "unset HF_HUB_OFFLINE"
            if before
            else "set download to true to fetch it"
        )
        raise DataError(f"hub data set {name!r}, split {split!r}, cannot be loaded: {error}; {todo}") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before
    return collect(table_records(found, columns, f"{name}[{split}]"), columns, f"{name}[{split}]")


def task(source: TaskSource, *, name: str) -> list[Row]:
    """Rows of a procedural task; row ``i`` is ``source[i]``.

    >>> task([("1+1=", "2")], name="sums")[0].gold
    '2'

    Raises:
        DataError: an empty task, or an item that is not a pair of texts.
    """
    pairs = (source[index] for index in range(len(source)))
    return unique([pair_row(pair, index, f"{name}[{index}]") for index, pair in enumerate(pairs)], name)


def generated(
    function: Callable[..., tuple[str, str]], *, split: str, size: int, seed: int, **arguments: Any
) -> list[Row]:
    """Row ``i`` is ``function(split, i, seed, **arguments) -> (question, gold)``, for ``i < size``.

    >>> generated(lambda split, i, seed: (f"{i}+{seed}=", str(i + seed)), split="train", size=2, seed=5)[1].question
    '1+5='

    Raises:
        DataError: a size below 1, or a result that is not a pair of texts.
    """
    origin = f"{getattr(function, '__name__', type(function).__name__)}[{split}]"
    return unique(
        [pair_row(function(split, index, seed, **arguments), index, f"{origin}[{index}]") for index in range(size)],
        origin,
    )


def unique(rows: list[Row], origin: str) -> list[Row]:
    """``rows`` themselves, when there are any and no two have the same id."""
    if not rows:
        raise DataError(f"{origin} is empty; expected at least one row")
    seen: dict[str, Row] = {}
    for row in rows:
        if row.id in seen:
            raise DataError(
                f"{origin}: {seen[row.id].source} and {row.source} have the same id {row.id!r}; expected unique ids "
                "(correct them, or leave the id column out to number the rows)"
            )
        seen[row.id] = row
    return rows


def collect(records: Iterable[tuple[str, Mapping[str, Any]]], columns: Columns, origin: str) -> list[Row]:
    """The checked rows of ``(where, record)`` pairs."""
    return unique([columns.row(record, index, where) for index, (where, record) in enumerate(records)], origin)


def json_records(path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """``("file:line", object)`` of every line that is not blank."""
    for file in matching(path):
        with open(file, "rb") as raw:
            packed = raw.read(2) == GZIP_MAGIC
        try:
            # bytes, because iterating a binary file splits at b"\n" only
            with gzip.open(file, "rb") if packed else open(file, "rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield f"{file}:{number}", json_object(line, f"{file}:{number}")
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{file} is a damaged gzip file: {error}; fetch it again") from error


def json_object(line: bytes, where: str) -> Mapping[str, Any]:
    """The JSON object on one line."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8: {error}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}; expected one object a line, found {line[:60]!r}") from error
    if not isinstance(value, dict):
        raise DataError(f"{where} holds a JSON {type(value).__name__}; expected an object with the columns as keys")
    return value


def parquet_records(path: str, columns: Columns) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """``("file[row]", record)`` of every row; only the columns that are asked for are read."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    for file in matching(path):
        try:
            with ParquetFile(file) as table:
                roots = columns.roots(table.schema_arrow.names, file)
                first = 0
                for batch in table.iter_batches(columns=roots):
                    for offset, record in enumerate(batch.to_pylist()):
                        yield f"{file}[{first + offset}]", record
                    first += batch.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{file} cannot be read as Parquet: {error}") from error


def table_records(table: Any, columns: Columns, origin: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """``("origin[row]", record)`` of a Hugging Face data set."""
    for index, record in enumerate(table.select_columns(columns.roots(table.column_names, origin))):
        yield f"{origin}[{index}]", record


def matching(path: str) -> list[str]:
    """The file ``path``, or the sorted files that match it as a pattern."""
    if Path(path).is_file():
        return [path]
    if Path(path).is_dir():
        raise DataError(f"{path} is a folder; expected a file or a pattern such as {path}/*.jsonl")
    found = sorted(file for file in glob.glob(path, recursive=True) if Path(file).is_file())
    if not found:
        raise DataError(f"{path} does not exist (working folder {Path.cwd()}); expected a data file or a pattern")
    return found


def lookup(record: Mapping[str, Any], column: str, where: str) -> Any:
    """``record[column]``, or the nested value that a dotted name leads to.

    >>> lookup({"prompt": [{"content": "1+1="}]}, "prompt.0.content", "f:1")
    '1+1='
    """
    if column in record:
        return record[column]
    value: Any = record
    for part in column.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise missing_column(column, list(record), where)
    return value


def plain_text(value: Any, column: str, where: str) -> str:
    """A text or finite number as text; a missing value is an error, never the text "None"."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not isinstance(value, str) and not whole and not (isinstance(value, float) and math.isfinite(value)):
        raise DataError(f"{where}: column {column!r} holds {value!r:.60}; expected text or a finite number")
    text = str(value)
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{where}: column {column!r} holds half a surrogate pair, which no tokenizer reads; remove it")
    return text


def pair_row(pair: Any, index: int, where: str) -> Row:
    """The row of a generated ``(question, gold)`` pair."""
    pair_of_texts = isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(text, str) and text for text in pair)
    if not pair_of_texts:
        raise DataError(f"{where} is {pair!r:.80}; expected (question, gold), two texts that are not empty")
    return Row(id=str(index), question=pair[0], gold=pair[1], source=where)


def missing_column(column: str, found: Sequence[str], where: str) -> DataError:
    """The error for a column that is not there; it names those that are."""
    return DataError(
        f"{where} has no column {column!r}; columns found: {', '.join(sorted(found)) or 'none'}. "
        "Name the right ones in the data set's columns"
    )
