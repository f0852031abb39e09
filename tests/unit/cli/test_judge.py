from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlprm.cli.judge import judge_file
from rlprm.errors import DataError

LIMITS = {"workers": 1, "timeout_s": 10.0, "memory_mb": 1024, "progress": False}
EXACT = "rlprm.verify.exact.verify"


def write(path: Path, *lines: str) -> Path:
    path.write_bytes("".join(line + "\n" for line in lines).encode("utf-8"))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_verdicts_line_for_line(tmp_path):
    rows = [
        {"gold": "42", "prediction": r"\boxed{42}"},
        {"gold": 42, "prediction": 41, "id": "b"},
        {"gold": "", "prediction": "42"},  # no gold answer: the verifier raises, so there is no verdict
        {"gold": "42", "prediction": None, "prompt": "6*7?"},
        {"gold": "2", "prediction": "1\u2028#### 2"},  # a line separator inside a string is no end of line
    ]
    source = write(tmp_path / "pairs.jsonl", *(json.dumps(row, ensure_ascii=False) for row in rows))
    counts = judge_file("rlprm.verify.math.verify", source, tmp_path / "out.jsonl", **LIMITS)
    verdicts = read(tmp_path / "out.jsonl")
    assert [row["verdict"] for row in verdicts] == [1, 0, None, 0, 1]
    assert [row.get("id") for row in verdicts] == [None, "b", None, None, None]
    assert "holds no answer" in verdicts[2]["reason"]
    assert all(set(row) - {"id"} == {"verdict", "reason", "seconds"} and row["seconds"] >= 0 for row in verdicts)
    assert {name: counts[name] for name in ("right", "wrong", "between", "none", "judged", "errors", "timeouts")} == {
        "right": 2, "wrong": 2, "between": 0, "none": 1, "judged": 4, "errors": 1, "timeouts": 0,
    }  # fmt: skip
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_many_lines_keep_their_order(tmp_path):
    source = write(tmp_path / "in.jsonl", *(json.dumps({"gold": "0", "prediction": str(n % 7)}) for n in range(500)))
    judge_file(EXACT, source, tmp_path / "out.jsonl", **LIMITS)
    assert [row["verdict"] for row in read(tmp_path / "out.jsonl")] == [int(n % 7 == 0) for n in range(500)]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        ("[1]", "found a list"),
        ('{"gold": "1"}', "no 'prediction'"),
        ('{"gold": null, "prediction": "1"}', "gold is null"),
        ('{"gold": "1", "prediction": ["1"]}', "prediction is"),
        ('{"gold": true, "prediction": "1"}', "gold is true"),
    ],
)
def test_a_bad_line_is_named_and_nothing_half_done_takes_the_name(tmp_path, line, why):
    source = write(tmp_path / "in.jsonl", '{"gold": "1", "prediction": "1"}', line)
    with pytest.raises(DataError, match=f"in.jsonl, line 2: .*{why}".replace("[", r"\[")):
        judge_file(EXACT, source, tmp_path / "out.jsonl", **LIMITS)
    assert not (tmp_path / "out.jsonl").exists()


def test_bytes_that_are_no_utf8(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b'{"gold": "\xff", "prediction": "1"}\n')
    with pytest.raises(DataError, match="line 1: not UTF-8"):
        judge_file(EXACT, tmp_path / "in.jsonl", tmp_path / "out.jsonl", **LIMITS)


def test_nothing_is_overwritten_unasked(tmp_path):
    source = write(tmp_path / "in.jsonl", '{"gold": "1", "prediction": "1"}')
    output = write(tmp_path / "out.jsonl", "precious")
    with pytest.raises(DataError, match="exists already"):
        judge_file(EXACT, source, output, **LIMITS)
    assert output.read_text() == "precious\n"
    with pytest.raises(DataError, match="is the input itself"):
        judge_file(EXACT, source, source, overwrite=True, **LIMITS)
    assert judge_file(EXACT, source, output, overwrite=True, **LIMITS)["right"] == 1
    with pytest.raises(DataError, match="no such file"):
        judge_file(EXACT, tmp_path / "absent.jsonl", output, overwrite=True, **LIMITS)
