"""Files that were fetched elsewhere are found and read; a prepared file is believed only with its fingerprint."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from rlprm.data import prepare_files as files
from rlprm.errors import DataError

ROWS = [{"q": f"{number}?", "meta": {"gold": str(number)}, "wide": "x" * 100} for number in range(5)]


def written(folder: Path, ending: str) -> Path:
    file = folder / f"train-0{ending}"
    table = pyarrow.Table.from_pylist(ROWS)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    if ending == ".parquet":
        pyarrow.parquet.write_table(table, file)
    elif ending == ".arrow":
        with pyarrow.ipc.new_stream(str(file), table.schema) as sink:
            sink.write_table(table, max_chunksize=2)
    elif ending == ".jsonl.gz":
        file.write_bytes(gzip.compress(lines.encode()))
    else:
        file.write_text(lines)
    return file


@pytest.mark.parametrize("ending", files.ENDINGS)
def test_every_kind_of_file_gives_the_same_records(tmp_path, ending):
    records = list(files.local_records([written(tmp_path, ending)], ["q", "meta.gold"]))
    assert [(record["q"], record["meta"]["gold"]) for _, record in records] == [
        (row["q"], row["meta"]["gold"]) for row in ROWS
    ]
    assert ("wide" in records[0][1]) == ("json" in ending)  # of tables only what is asked for is read


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_a_damaged_table_is_named(tmp_path, ending):
    file = written(tmp_path, ending)
    file.write_bytes(file.read_bytes()[:40] + b"damage")
    with pytest.raises(DataError, match=rf"train-0{ending} cannot be read as {ending[1:]}"):
        list(files.local_records([file], ["q"]))


def test_a_table_without_the_column_says_which_there_are(tmp_path):
    with pytest.raises(DataError, match="has no column 'question'; columns found: meta, q, wide"):
        list(files.local_records([written(tmp_path, ".parquet")], ["question"]))


def test_a_split_is_found_as_one_file_or_as_a_fetched_repository(tmp_path):
    repository = tmp_path / "owner/set/main"
    repository.mkdir(parents=True)
    parts = [repository / "train-0.parquet", repository / "train-1.parquet"]
    for part in [*parts, repository / "test-0.parquet"]:
        part.touch()
    assert files.local_files(tmp_path, "mine", "owner/set", "train", "main/train-*") == parts
    assert files.local_files(tmp_path, "mine", "owner/set", "train", "data/train-*") == parts
    (tmp_path / "mine.jsonl").touch()
    assert files.local_files(tmp_path, "mine", "owner/set", "train", "main/train-*") == [tmp_path / "mine.jsonl"]


def test_nothing_and_too_much_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds nothing of mine; expected mine.jsonl .* or data/train-\* or train\*"):
        files.local_files(tmp_path, "mine", "owner/set", "train", "data/train-*")
    (tmp_path / "set").mkdir()
    for ending in (".parquet", ".jsonl"):
        (tmp_path / "set" / f"train{ending}").touch()
    with pytest.raises(DataError, match=r"as .jsonl and .parquet; leave the files of one kind there"):
        files.local_files(tmp_path, "mine", "owner/set", "train", "train*")


def test_a_file_is_ready_only_as_it_was_written_and_with_its_settings(tmp_path):
    file = tmp_path / "deep/train.jsonl"
    assert files.find(file, "s").state == "absent"
    files.write(file, [{"question": "1?", "answer": "\u2028"}], {"settings": "s", "written": "now"})
    assert files.find(file, "s") == files.Found("ready", json.loads(files.fingerprint_of(file).read_text()))
    assert files.find(file, "t").state == "outdated"
    assert [each.name for each in sorted(file.parent.iterdir())] == ["train.jsonl", "train.jsonl.fingerprint.json"]
    assert files.keys_of(file) == {"1"}
    file.write_text(file.read_text() + "\n")
    with pytest.raises(DataError, match=r"is not what its fingerprint .* says: it was changed; move it away"):
        files.find(file, "s")
    files.fingerprint_of(file).unlink()
    with pytest.raises(DataError, match=r"is there without train.jsonl.fingerprint.json, so it was not written here"):
        files.find(file, "s")


def test_a_crash_between_file_and_fingerprint_is_noticed(tmp_path, monkeypatch):
    file = tmp_path / "train.jsonl"
    files.write(file, [{"question": "1?"}], {"settings": "s"})
    real = files._replace

    def crashing(target: Path, text: str) -> None:
        if target != file:
            raise OSError("disk full")
        real(target, text)

    monkeypatch.setattr(files, "_replace", crashing)
    with pytest.raises(DataError, match=r"cannot be written \(disk full\); choose another data_dir"):
        files.write(file, [{"question": "2?"}], {"settings": "s"})
    with pytest.raises(DataError, match="is there without"):
        files.find(file, "s")
