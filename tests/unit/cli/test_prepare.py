"""`rlprm prepare` makes what is missing, once; what it cannot make it says in one sentence."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from huggingface_hub import constants

from rlprm.cli.main import main

SMALL = Path(__file__).resolve().parents[2] / "data/gsm8k_small"
RECIPE = "recipe=gsm8k_qwen2.5_0.5b"
SIZES = ["data.gsm8k_train.rows=16", "data.gsm8k_test.rows=16"]


@pytest.fixture
def fetched(tmp_path) -> Path:
    """A folder of what was fetched elsewhere."""
    folder = tmp_path / "from"
    for split in ("train", "test"):
        (folder / "openai/gsm8k/main").mkdir(parents=True, exist_ok=True)
        shutil.copy(SMALL / f"{split}.jsonl", folder / f"openai/gsm8k/main/{split}-0.jsonl")
    model = folder / "Qwen2.5-0.5B-Instruct"
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (model / name).write_text("{}")
    return folder


def prepare(tmp_path: Path, *words: str) -> int:
    return main(["prepare", RECIPE, *SIZES, f"data_dir={tmp_path}/data", f"models_dir={tmp_path}/models", *words])


def rows(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_data_and_model_are_prepared_once(tmp_path, fetched, capsys):
    assert prepare(tmp_path, "--check") == 1
    assert capsys.readouterr().out.count("missing") == 3
    assert prepare(tmp_path, "--from", str(fetched)) == 0
    said = capsys.readouterr().out
    assert "gsm8k_train: 16 rows of" in said
    assert "policy: copied from" in said
    train = tmp_path / "data/gsm8k/train.jsonl"
    assert [row["answer"] for row in rows(train)][-1] == "1080"  # the thousands comma is gone
    assert "####" in rows(train)[-1]["solution"]
    about = json.loads((tmp_path / "data/gsm8k/train.jsonl.fingerprint.json").read_text())
    assert (about["records"], about["rows"], about["left_out"], about["commit"]) == (16, 16, {}, None)
    before = train.stat().st_mtime_ns
    assert prepare(tmp_path) == 0  # nothing is fetched: the hub is not asked
    assert capsys.readouterr().out.count(": ready, ") == 3
    assert train.stat().st_mtime_ns == before
    assert prepare(tmp_path, "--check") == 0


def test_prepared_files_are_what_the_recipe_reads(tmp_path, fetched, monkeypatch):
    from rlprm.cli.compose import composed
    from rlprm.parts import made

    assert prepare(tmp_path, "--from", str(fetched), "--only", "data") == 0
    assert not (tmp_path / "models").exists()
    monkeypatch.setenv("RLPRM_DATA", str(tmp_path / "data"))
    data = composed("train", [RECIPE]).values["data"]
    assert made(data["train"]["prepared"]["reader"])[0].gold == rows(tmp_path / "data/gsm8k/train.jsonl")[0]["answer"]
    assert len(made(data["evaluation"]["gsm8k_test"])) == 16


def test_questions_of_the_test_set_are_taken_out_and_said(tmp_path, fetched, capsys):
    lines = (SMALL / "train.jsonl").read_text(encoding="utf-8").splitlines()
    stolen = json.loads((SMALL / "test.jsonl").read_text(encoding="utf-8").splitlines()[3])
    stolen["question"] = stolen["question"].upper().replace(".", " . ")
    text = "\n".join([json.dumps(stolen), *lines[1:], lines[1]]) + "\n"
    (fetched / "openai/gsm8k/main/train-0.jsonl").write_text(text)
    assert prepare(tmp_path, "--from", str(fetched), "--only", "data", "data.gsm8k_train.rows=17") == 0
    assert "15 rows (left out: 1 also in gsm8k_test, 1 repeated)" in capsys.readouterr().out


def test_another_evaluation_set_makes_the_training_set_anew(tmp_path, fetched, capsys):
    assert prepare(tmp_path, "--from", str(fetched), "--only", "data") == 0
    test = fetched / "openai/gsm8k/main/test-0.jsonl"
    test.write_text((SMALL / "train.jsonl").read_text(encoding="utf-8").splitlines()[0] + "\n")
    words = ["--only", "data", "data.gsm8k_test.rows=1"]
    assert prepare(tmp_path, "--check", *words) == 1
    assert "gsm8k_test: made with other settings" in capsys.readouterr().out
    assert prepare(tmp_path, "--from", str(fetched), *words) == 0
    assert "gsm8k_train: 15 rows (left out: 1 also in gsm8k_test)" in capsys.readouterr().out


def test_a_split_without_a_fixed_commit_says_which_one_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "dataset_info",
        lambda self, name, **asked: huggingface_hub.DatasetInfo(id=name, sha="c0ffee"),
    )
    small = {split: rows(SMALL / f"{split}.jsonl") for split in ("train", "test")}
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, config, split, revision: datasets.Dataset.from_list(small[split])
    )
    assert prepare(tmp_path, "--only", "data", "data.gsm8k_test.revision=c0ffee") == 0
    test, train = capsys.readouterr().out.splitlines()
    assert "not pinned" not in test
    assert train.endswith("; its revision is not pinned, this is commit c0ffee")
    about = json.loads((tmp_path / "data/gsm8k/train.jsonl.fingerprint.json").read_text())
    assert about["commit"] == "c0ffee"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from", "nowhere"], "--from nowhere is no folder"),
        (["data.gsm8k_train.rows=7"], "has 16 records and 7 were expected; .* set data.gsm8k_train.rows to 16"),
        (["data.gsm8k_train.columns=a"], "data.gsm8k_train.columns: there is no such key"),
        (["data.gsm8k_train.output=../x"], r"data.gsm8k_train.output: is '../x'; expected a path below"),
        (["data.gsm8k_train.output=gsm8k/test.jsonl"], "two entries have the output 'gsm8k/test.jsonl'"),
        (["data.gsm8k_train.hub=gsm8k"], "data.gsm8k_train.hub: found 'gsm8k'"),
        (["data.gsm8k_train.question=text"], "has no column 'text'; columns found: answer, question"),
        (["data.gsm8k_train.gold_pattern='(nothing)'"], "holds no gold answer that the verifier can read"),
    ],
)
def test_what_cannot_work_is_said_in_a_sentence(tmp_path, fetched, capsys, words, message):
    assert prepare(tmp_path, *([] if "--from" in words else ["--from", str(fetched)]), *words) == 1
    assert re.search(message, capsys.readouterr().err)


def test_a_recipe_that_brings_everything_needs_nothing(capsys):
    assert main(["prepare", "recipe=chain_arithmetic_cpu"]) == 0
    assert "needs no data or models from elsewhere" in capsys.readouterr().out
    assert main(["prepare", "recipe=chain_arithmetic_cpu", "timeout_s=5.0", "--check"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "neither data nor models are named; give recipe=NAME"),
        (["recipe=chain_arithmetic_cpu", "bogus=1"], "bogus: there is no such key"),
        (["recipe=chain_arithmetic_cpu", "timeout_s=x"], "timeout_s"),
        (["recipe=chain_arithmetic_cpu", "--from", "nowhere"], "--from nowhere is no folder"),
        (["recipe="], "recipe"),
        (["recipe=gsm8k_qwen2.5"], "recipe 'gsm8k_qwen2.5' does not exist .* nearest is 'gsm8k_qwen2.5_0.5b'"),
        (["+dataset@data.a=gsm8k"], "dataset=gsm8k: there is no such option"),
    ],
)
def test_nothing_to_prepare_is_said(capsys, words, message):
    assert main(["prepare", *words]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_a_file_of_somebody_else_is_left_alone(tmp_path, fetched, capsys):
    theirs = tmp_path / "data/gsm8k/train.jsonl"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine\n")
    assert prepare(tmp_path, "--from", str(fetched)) == 1
    assert "was not written here; move it away" in capsys.readouterr().err
    assert theirs.read_text() == "mine\n"


def test_a_half_copied_model_is_not_taken_for_one(tmp_path, fetched, capsys):
    (tmp_path / "models/Qwen2.5-0.5B-Instruct").mkdir(parents=True)
    assert prepare(tmp_path, "--from", str(fetched), "--only", "models") == 1
    assert "is no complete model: it has no config.json; move it away" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "column", "before", "after"),
    [
        ("eurus2_rl", 1, "", "\n\nPresent the answer in LaTex format: \\boxed{Your answer}"),
        (
            "dapo17k",
            0,
            "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
            "$Answer (without quotes) where $Answer is the answer to the problem.\n\n",
            '\n\nRemember to put your answer on its own line after "Answer:".',
        ),
    ],
)
def test_what_a_prompt_says_around_the_problem_is_taken_off(tmp_path, option, column, before, after, capsys):
    question = "Find $x$.\n\nIt is\nSolve the following math problem step by step."
    turns = [{"role": "system", "content": "s"}] * column + [{"role": "user", "content": before + question + after}]
    record = {"prompt": turns, "ability": "math", "reward_model": {"ground_truth": "34", "style": "rule"}}
    code = {**record, "ability": "code", "reward_model": {"ground_truth": None, "style": "rule"}}
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (record, record, code)))
    assert main(["prepare", f"+dataset@data.one={option}", f"data_dir={tmp_path}/d", "--from", str(tmp_path)]) == 0
    made = rows(next((tmp_path / "d").rglob("train.jsonl")))
    assert [(row["question"], row["answer"]) for row in made] == [(question, "34")]
    said = capsys.readouterr().out
    assert "1 repeated" in said
    assert ("1 ability is code" if option == "eurus2_rl" else "1 no gold answer") in said
