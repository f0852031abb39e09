"""Readers: the same rows from every format, and errors that name the file, the line and the columns found."""

from __future__ import annotations

import gzip
import json
import socket
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from rlprm.data.datasets import Columns, TaskSource, generated, hub, jsonl, on_disk, parquet, task, unique
from rlprm.data.tasks.chain_arithmetic import ChainArithmetic
from rlprm.errors import ConfigError, DataError

GSM8K = Path(__file__).parents[2] / "data" / "gsm8k_small"
RECORDS = [{"q": "1+1=", "a": "so #### 2", "n": 7}, {"q": "2+2=", "a": "first #### 3\nno, #### 4", "n": 8}]


def columns(question="q", answer="a", gold_pattern=r"#### (\S+)", gold_remove="", missing_gold="refuse", id=None):
    return Columns(
        question=question,
        answer=answer,
        gold_pattern=gold_pattern,
        gold_remove=gold_remove,
        missing_gold=missing_gold,
        id=id,
    )


def write_lines(path: Path, *lines: str) -> str:
    path.write_bytes(b"".join(line.encode() + b"\n" for line in lines))
    return str(path)


def facts(rows):
    return [(row.id, row.question, row.gold) for row in rows]


EXPECTED = [("0", "1+1=", "2"), ("1", "2+2=", "4")]  # the last match of "#### ..." is the gold


def test_jsonl(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", *map(json.dumps, RECORDS))
    rows = jsonl(path, columns=columns())
    assert facts(rows) == EXPECTED
    assert [row.source for row in rows] == [f"{path}:1", f"{path}:2"]


def test_jsonl_counts_blank_lines_and_splits_at_newline_only(tmp_path):
    question = "a\u2028b\x85c\x0bd"  # str.splitlines would cut this into four
    path = write_lines(tmp_path / "d.jsonl", "", json.dumps({"q": question, "a": "#### 1"}, ensure_ascii=False), "\r")
    (row,) = jsonl(path, columns=columns())
    assert (row.question, row.source) == (question, f"{path}:2")


def test_jsonl_gzip_is_known_by_its_content(tmp_path):
    path = tmp_path / "packed_without_suffix"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, RECORDS)).encode()))
    assert facts(jsonl(str(path), columns=columns())) == EXPECTED


def test_a_cut_gzip_file_is_an_error(tmp_path):
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, RECORDS)).encode())[:-9])
    with pytest.raises(DataError, match=r"d\.jsonl\.gz is a damaged gzip file"):
        jsonl(str(path), columns=columns())


def test_a_pattern_reads_all_files_in_order(tmp_path):
    for name, record in zip(["b", "a"], reversed(RECORDS), strict=True):
        write_lines(tmp_path / f"{name}.jsonl", json.dumps(record))
    assert facts(jsonl(f"{tmp_path}/*.jsonl", columns=columns())) == EXPECTED


@pytest.mark.parametrize("row_group", [1, 2])
def test_parquet(tmp_path, row_group):
    path = str(tmp_path / "d.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path, row_group_size=row_group)
    rows = parquet(path, columns=columns())
    assert facts(rows) == EXPECTED
    assert rows[1].source == f"{path}[1]"


def test_parquet_rows_are_numbered_over_all_batches(tmp_path):
    path = str(tmp_path / "d.parquet")
    size = 2**16 + 1  # one more than pyarrow hands out at a time
    pyarrow.parquet.write_table(pyarrow.table({"q": ["1+1="] * size, "a": ["#### 2"] * size}), path)
    assert parquet(path, columns=columns())[-1].source == f"{path}[65536]"


def test_parquet_nested_columns(tmp_path):
    path = str(tmp_path / "d.parquet")
    records = [{"prompt": [{"content": "1+1="}], "reward_model": {"ground_truth": "2"}, "big": "x"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    nested = columns(question="prompt.0.content", answer="reward_model.ground_truth", gold_pattern=None)
    assert facts(parquet(path, columns=nested)) == [("0", "1+1=", "2")]
    with pytest.raises(DataError, match=r"no column 'prompt.1.content'; columns found: prompt, reward_model"):
        parquet(path, columns=columns(question="prompt.1.content", answer="reward_model.ground_truth"))


def test_not_parquet(tmp_path):
    with pytest.raises(DataError, match=r"d\.parquet cannot be read as Parquet"):
        parquet(write_lines(tmp_path / "d.parquet", "hello"), columns=columns())


def test_on_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(RECORDS)
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(str(tmp_path / "many"))
    assert facts(on_disk(str(tmp_path / "one"), split=None, columns=columns())) == EXPECTED
    (row,) = on_disk(str(tmp_path / "many"), split="test", columns=columns())
    assert (row.gold, row.source) == ("4", f"{tmp_path}/many[test][0]")
    with pytest.raises(DataError, match="no split 'dev'; splits found: test, train"):
        on_disk(str(tmp_path / "many"), split="dev", columns=columns())
    with pytest.raises(DataError, match="single data set without splits"):
        on_disk(str(tmp_path / "one"), split="train", columns=columns())
    with pytest.raises(DataError, match=r"no column 'x'; columns found: a, n, q"):
        on_disk(str(tmp_path / "one"), split=None, columns=columns(question="x"))
    with pytest.raises(DataError, match="cannot be read as a folder written by datasets"):
        on_disk(str(tmp_path), split=None, columns=columns())
    with pytest.raises(DataError, match="is not a folder"):
        on_disk(str(tmp_path / "none"), split=None, columns=columns())


def test_hub_does_not_touch_the_network_unless_asked(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    asked: list[str] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: asked.append(host))
    wanted = {"config_name": None, "split": "train", "revision": None, "columns": columns()}
    with pytest.raises(DataError, match=r"hub data set 'nobody/nothing'.*set download to true"):
        hub("nobody/nothing", download=False, **wanted)
    assert datasets.config.HF_HUB_OFFLINE is False  # put back
    assert asked == []
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"hub data set 'nobody/nothing'.*unset HF_HUB_OFFLINE"):
        hub("nobody/nothing", download=True, **wanted)
    with pytest.raises(DataError, match="is a local path or no hub name"):
        hub("s3://bucket/x", download=False, **wanted)


def test_hub_reads_what_is_loaded(monkeypatch):
    datasets = pytest.importorskip("datasets")
    seen = []

    def load_dataset(name, config_name, *, split, revision):
        seen.append((name, config_name, split, revision, datasets.config.HF_HUB_OFFLINE))
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    rows = hub("owner/name", config_name="main", split="train", revision="abc", download=True, columns=columns())
    assert facts(rows) == EXPECTED
    assert seen == [("owner/name", "main", "train", "abc", False)]
    assert rows[0].source == "owner/name[train][0]"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"q": "1"', r"d\.jsonl:2 is not JSON"),
        ("[1]", r"d\.jsonl:2 holds a JSON list; expected an object"),
        ('{"q": "1", "b": "2"}', r"d\.jsonl:2 has no column 'a'; columns found: b, q"),
        ('{"q": " ", "a": "#### 2"}', r"d\.jsonl:2: column 'q' holds ' '"),
        ('{"q": 3, "a": "#### 2"}', r"d\.jsonl:2: column 'q' holds 3"),
        ('{"q": "1", "a": null}', r"d\.jsonl:2: the answer in column 'a' .*ends in null.*set missing_gold to drop"),
        ('{"q": "1", "a": true}', r"d\.jsonl:2: column 'a' holds True"),
        ('{"q": "1", "a": NaN}', r"d\.jsonl:2: column 'a' holds nan"),
        ('{"q": "1", "a": "no mark"}', r"d\.jsonl:2: .*nothing that gold_pattern '#### .*ends in 'no mark'"),
        ('{"q": "1 \\ud800", "a": "#### 2"}', r"d\.jsonl:2: column 'q' holds half a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = write_lines(tmp_path / "d.jsonl", json.dumps(RECORDS[0]), line)
    with pytest.raises(DataError, match=message):
        jsonl(path, columns=columns())


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b'{"q": "1", "a": "#### 2"}\n{"q": "\xff", "a": "#### 2"}\n')
    with pytest.raises(DataError, match=r"d\.jsonl:2 is not UTF-8"):
        jsonl(str(tmp_path / "d.jsonl"), columns=columns())


def test_missing_files_folders_and_empty_files(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl does not exist"):
        jsonl(str(tmp_path / "none.jsonl"), columns=columns())
    with pytest.raises(DataError, match=r"is a folder; expected a file"):
        jsonl(str(tmp_path), columns=columns())
    with pytest.raises(DataError, match=r"d\.jsonl is empty; expected at least one row"):
        jsonl(write_lines(tmp_path / "d.jsonl"), columns=columns())


def test_missing_gold_can_be_dropped_but_stays_in_sight(tmp_path):
    lines = ['{"q": "1", "a": null}', '{"q": "2", "a": "no mark"}', '{"q": "3", "a": "#### 3"}']
    rows = jsonl(write_lines(tmp_path / "d.jsonl", *lines), columns=columns(missing_gold="drop"))
    assert [row.gold for row in rows] == [None, None, "3"]


def test_numbers_are_golds_as_they_are_written(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", '{"q": "a", "a": 72}', '{"q": "b", "a": -0.5}')
    assert [row.gold for row in jsonl(path, columns=columns(gold_pattern=None))] == ["72", "-0.5"]


def test_ids_from_a_column_must_differ(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", *map(json.dumps, RECORDS))
    assert [row.id for row in jsonl(path, columns=columns(id="n"))] == ["7", "8"]
    path = write_lines(tmp_path / "d.jsonl", *map(json.dumps, [RECORDS[0], RECORDS[1], RECORDS[0]]))
    with pytest.raises(DataError, match=r"d\.jsonl:1 and .*d\.jsonl:3 have the same id '7'"):
        jsonl(path, columns=columns(id="n"))


@pytest.mark.parametrize(("pattern", "groups"), [("#### .+", 0), ("(#+) (.+)", 2)])
def test_a_pattern_needs_one_group(pattern, groups):
    with pytest.raises(ConfigError, match=f"has {groups} groups; expected exactly one"):
        columns(gold_pattern=pattern)


def test_a_pattern_must_compile():
    with pytest.raises(ConfigError, match="is not a regular expression"):
        columns(gold_pattern="(")


def test_gsm8k():
    gsm8k = columns("question", "answer", "#### (.+)$", ",")
    train = jsonl(str(GSM8K / "train.jsonl"), columns=gsm8k)
    test = jsonl(str(GSM8K / "test.jsonl"), columns=gsm8k)
    # The first three and the last answer of each file, read by eye; the last ones are written 1,080 and 2,125.
    assert [train[i].gold for i in (0, 1, 2, 15)] == ["72", "10", "5", "1080"]
    assert [test[i].gold for i in (0, 1, 2, 15)] == ["18", "3", "70000", "2125"]
    assert len(train) == len(test) == 16
    assert not {row.question for row in train} & {row.question for row in test}


def test_boxed_answers_with_nested_braces(tmp_path):
    # What the MATH solutions need: the last \boxed{...}, braces up to three deep inside it.
    boxed = r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*)\}"
    solution = r"First $\boxed{1}$; better $\boxed{\frac{\sqrt{3}}{2}}$, where $x \in \{1, 2\}$."
    path = write_lines(tmp_path / "d.jsonl", json.dumps({"q": "x?", "a": solution}))
    assert jsonl(path, columns=columns(gold_pattern=boxed))[0].gold == r"\frac{\sqrt{3}}{2}"


def test_generated_rows_are_a_function_of_split_index_and_seed():
    def sums(split, index, seed, *, top):
        return f"{split}:{index}+{seed}<{top}", str(index + seed)

    rows = generated(sums, split="test", size=2, seed=3, top=9)
    assert facts(rows) == [("0", "test:0+3<9", "3"), ("1", "test:1+3<9", "4")]
    with pytest.raises(DataError, match=r"sums\[train\] is empty"):
        generated(sums, split="train", size=0, seed=3, top=9)
    with pytest.raises(DataError, match=r"\[0\] is \('1', 2\); expected \(question, gold\)"):
        generated(lambda split, index, seed: ("1", 2), split="train", size=1, seed=0)


def test_the_embedded_task_is_a_generated_source():
    chain = ChainArithmetic(modulus=7, operations=(2, 2))

    def pair(split, index, seed):
        problem = chain.problem(seed=seed, index=index, split=split)
        return problem.prompt, problem.gold

    rows = generated(pair, split="train", size=5, seed=0)
    assert rows[4].question == chain.problem(seed=0, index=4, split="train").prompt


def test_task_rows():
    pairs = [("1+1=", "2"), ("2+2=", "4")]
    assert isinstance(pairs, TaskSource)
    assert facts(task(pairs, name="sums")) == EXPECTED
    with pytest.raises(DataError, match="sums is empty"):
        task([], name="sums")


def test_unique_gives_the_rows_back():
    rows = task([("1+1=", "2")], name="sums")
    assert unique(rows, "sums") is rows
