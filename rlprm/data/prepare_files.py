"""Prepared files: a JSON-lines file and, beside it, a fingerprint that says what it was made of.

A file whose fingerprint agrees is not made again. A file that nobody can vouch for is never overwritten.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlprm.data.datasets import json_records, missing_column
from rlprm.data.prepare import key
from rlprm.errors import DataError

ENDINGS = (".parquet", ".arrow", ".jsonl", ".jsonl.gz", ".json")
State = Literal["ready", "absent", "outdated"]


@dataclass(frozen=True, slots=True)
class Found:
    """A prepared file: does it have to be made, and what its fingerprint says (empty where there is none)."""

    state: State
    fingerprint: Mapping[str, Any]


def fingerprint_of(file: Path) -> Path:
    """Where the fingerprint of ``file`` lies.

    >>> fingerprint_of(Path("gsm8k/train.jsonl")).name
    'train.jsonl.fingerprint.json'
    """
    return file.with_name(file.name + ".fingerprint.json")


def find(file: Path, settings: str) -> Found:
    """Is ``file`` there, untouched, and made with these ``settings`` (a digest)?

    Raises:
        DataError: a file without fingerprint, or one that was changed after it was written.
    """
    if not file.exists():
        return Found("absent", {})
    beside = fingerprint_of(file)
    remedy = "move it away (or choose another data_dir) and prepare again"
    try:
        said = json.loads(beside.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{file} is there without {beside.name}, so it was not written here; {remedy}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{beside} cannot be read ({error}); {remedy}") from error
    if not isinstance(said, dict) or said.get("sha256") != digest(file):
        raise DataError(f"{file} is not what its fingerprint {beside.name} says: it was changed; {remedy}")
    return Found("ready" if said.get("settings") == settings else "outdated", said)


def write(file: Path, rows: Sequence[Mapping[str, str]], about: Mapping[str, Any]) -> Mapping[str, Any]:
    """Write rows and fingerprint, each whole or not at all; the fingerprint that was written.

    Raises:
        DataError: the folder cannot be written to.
    """
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    said = {**about, "rows": len(rows), "sha256": hashlib.sha256(text.encode("utf-8")).hexdigest()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # without the old fingerprint first: a crash between the two leaves a file that is refused, not one that is believed
        fingerprint_of(file).unlink(missing_ok=True)
        _replace(file, text)
        _replace(fingerprint_of(file), json.dumps(said, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise DataError(f"{file} cannot be written ({error}); choose another data_dir") from error
    return said


def keys_of(file: Path) -> frozenset[str]:
    """The questions of a prepared file, as they are compared."""
    return frozenset(key(str(record["question"])) for _, record in json_records(str(file)))


def digest(file: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    found = hashlib.sha256()
    with file.open("rb") as content:
        while piece := content.read(1 << 20):
            found.update(piece)
    return found.hexdigest()


def settings_digest(settings: Mapping[str, Any]) -> str:
    """SHA-256 of settings, whatever their order.

    >>> settings_digest({"a": 1, "b": 2}) == settings_digest({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode("utf-8")).hexdigest()


def local_files(folder: Path, name: str, hub: str, split: str, pattern: str) -> list[Path]:
    """The files of a split below ``folder``, which holds data sets that were fetched elsewhere.

    Looked for in this order: ``NAME.jsonl`` (or another ending), then inside ``owner/name``, ``name`` (of the hub) or
    ``NAME`` (of the recipe) the files that match ``pattern``, then there those whose name begins with the split's.

    Raises:
        DataError: no such file; files of several kinds.
    """
    for ending in ENDINGS:
        if (folder / f"{name}{ending}").is_file():
            return [folder / f"{name}{ending}"]
    places = list(dict.fromkeys([folder / hub, folder / hub.rpartition("/")[2], folder / name]))
    for place in places:
        for each in (pattern, f"{split}*", f"**/{split}*"):
            found = sorted(file for file in place.glob(each) if file.is_file() and file.name.endswith(ENDINGS))
            found = [file for file in found if not file.name.endswith(".fingerprint.json")]
            kinds = sorted({file.suffix for file in found})
            if len(kinds) > 1:
                raise DataError(
                    f"{place} holds split {split!r} as {' and '.join(kinds)}; leave the files of one kind there"
                )
            if found:
                return found
    raise DataError(
        f"{folder} holds nothing of {name}; expected {name}.jsonl (or {', '.join(ENDINGS)}), or {pattern} or {split}* in one "
        f"of {', '.join(str(place) for place in places)}"
    )


def local_records(files: Sequence[Path], columns: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """``(where, record)`` of Parquet, Arrow or JSON-lines files; of wide tables only ``columns`` are read.

    Raises:
        DataError: a file that cannot be read, or that has not these columns.
    """
    for file in files:
        if file.name.endswith((".parquet", ".arrow")):
            yield from _table(file, columns)
        else:
            yield from json_records(str(file))


def roots(columns: Sequence[str], found: Sequence[str], where: str) -> list[str]:
    """Top-level columns that dotted names lead into.

    Raises:
        DataError: one is not there.
    """
    wanted = list(dict.fromkeys(each if each in found else each.split(".")[0] for each in columns))
    for each in wanted:
        if each not in found:
            raise missing_column(each, found, where)
    return wanted


def _table(file: Path, columns: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    first = 0
    try:
        if file.suffix == ".parquet":
            with ParquetFile(file) as table:
                wanted = roots(columns, table.schema_arrow.names, str(file))
                for batch in table.iter_batches(columns=wanted, batch_size=4096):
                    yield from _numbered(file, first, batch.to_pylist())
                    first += batch.num_rows
            return
        with pyarrow.memory_map(str(file)) as raw:
            stream = pyarrow.ipc.open_stream(raw)  # what datasets writes
            wanted = roots(columns, stream.schema.names, str(file))
            for batch in stream:
                yield from _numbered(file, first, batch.select(wanted).to_pylist())
                first += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read as {file.suffix.removeprefix('.')}: {error}") from error


def _numbered(file: Path, first: int, records: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for offset, record in enumerate(records):
        yield f"{file}[{first + offset}]", record


def _replace(file: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", newline="\n", dir=file.parent, prefix=f".{file.name}.", suffix=".tmp", delete=False
    ) as partial:
        partial.write(text)
        partial.flush()
        os.fsync(partial.fileno())
    os.chmod(partial.name, 0o644)  # a temporary file is its owner's alone; prepared data is read by every node's user
    os.replace(partial.name, file)
