"""What a user can get wrong in `rlprm train`: one clear message, exit code 1, before Ray starts and nothing is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ray

from rlprm.cli.main import main
from rlprm.data.tasks.chain_arithmetic import write_model_folder
from rlprm.run.folder import RunFolder

RECIPE = "recipe=chain_arithmetic_cpu"
# Rows with columns question and answer, rendered without a chat template.
LINES = """
train:
  rows:
    weight: 1.0
    reader:
      _target_: rlprm.data.datasets.jsonl
      path: {path}
      columns: {{_target_: rlprm.data.datasets.Columns, question: question, answer: answer, gold_pattern: null,
                gold_remove: "", missing_gold: refuse, id: null}}
evaluation: {{}}
template: {{_target_: rlprm.data.templates.plain, _partial_: true, format: "{{question}}", bos: never}}
max_prompt_tokens: 8
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    write_model_folder(folder, 0, hidden=32, layers=1, heads=1, context=128)
    return str(folder)


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Run a command line that must fail; the message. Ray must not have been asked for."""

    def start(**options):
        pytest.fail("Ray was started before the mistake was found")

    monkeypatch.setattr(ray, "init", start)

    def call(*words: str, command: str = "train") -> str:
        assert main([command, *words]) == 1
        said = capsys.readouterr()
        assert said.out == ""
        assert "Traceback" not in said.err
        assert said.err.startswith(f"rlprm {command}: ")
        assert len(said.err.strip().splitlines()) == 1, said.err
        return said.err

    return call


def lines(folder: Path, *rows: dict) -> list[str]:
    """Arguments that train on these rows."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own/data").mkdir(parents=True)
    (folder / "own/data/lines.yaml").write_text(LINES.format(path=path))
    return ["--config-dir", str(folder / "own"), "data=lines", "verifier=exact"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("rolout=vllm_cpu", "rolout: there is no such key .*nearest is 'rollout'"),
        ("+rolout=vllm_cpu", "rolout: there is no such key or group; nearest is 'rollout'"),
        ("policy.lrr=1e-5", "policy.lrr: there is no such key .*nearest is 'policy.lr'"),
        ("streams.outcom.weight=2", "nearest is 'streams.outcome.weight'"),
        ("+policy.warmupp=3", "policy.warmupp: unknown key; nearest is 'warmup'"),
        ("+methd=ppo", "methd: there is no such key or group; nearest is 'method'"),
        ("~modle", "modle: there is no such key .*nearest is 'model'"),
        ("method=outcome_grpoo", r"method=outcome_grpoo: .*\(there are: capo, .*nearest is 'outcome_grpo'"),
        ("method=prime", "nearest is 'prime_ppo'"),
        ("gate@streams.process.gate=trst", "gate=trst: there is no such option .*nearest is 'trust'"),
        ("normalizer=raw", "normalizer@streams.outcome.normalizer=.*also: .*streams.process.normalizer"),
        ("steps=[1,", r"'steps=\[1,' cannot be read .*expected key=value"),
        ("steps", "'steps' cannot be read"),
        ("steps=1,2", "'steps=1,2' gives several values; write a list as"),
        ("steps=many", "steps: found 'many'; Input should be a valid integer"),
        ("steps=0", "steps: found 0; Input should be greater than or equal to 1"),
        ("policy.lr=-1", "policy.lr: found -1; Input should be greater than 0"),
        ("responses_per_prompt=1", "centres by leave_one_out, .* responses_per_prompt is 1; use at least 2"),
        ("critic=value", "the estimator must be none"),
        ("policy_loss.aggregation=seq-mean-token-sum-norm", "horizon is None with aggregation"),
        ("placement.device=cuda", "device cuda with gpus_per_rank 0.0"),
        ("--seeds=0,a", "--seeds is '0,a'; expected whole numbers"),
        ("--seeds=1,1", "names a seed twice"),
        ("--seeds=-1", "seed: found -1"),
        ("policy_loss.kl_kind=k1", "kl_kind is k1, and k1 as a loss has zero expected gradient"),
        ("temperature=0.001", "temperature 0.001 is below 0.01"),
        ("placement=gpu1", "kv_cache_bytes is set and placement.device is cuda.*use rollout=vllm_gpu"),
        ("--sedes=1", "unrecognized arguments: --sedes=1 .*nearest is '--seeds'"),
        ("--seed=1", "unrecognized arguments: --seed=1 .*nearest is '--seeds'"),  # no abbreviation that means another
        ("--config-dir=/nonexistent", "configuration folder /nonexistent does not exist"),
        ("recipe=other", "recipe is given 2 times"),
    ],
)
def test_a_bad_word_is_named(refused, model, tmp_path, word, message):
    import re

    said = refused(RECIPE, f"model.path={model}", f"output_dir={tmp_path}/runs", word)
    assert re.search(message, said), said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("word", ["seed=5", "+seed=5", "~seed"])
def test_seed_beside_seeds_is_not_dropped(refused, model, word):
    said = refused(RECIPE, f"model.path={model}", word, "--seeds", "0,1")
    assert f"{word} and --seeds 0,1 both say which seed to run" in said


def test_recipe_and_mandatory_value(refused):
    assert "nearest is 'chain_arithmetic_cpu'" in refused("recipe=chain_aritmetic_cpu")
    assert "no value for model.path; give it on the command line (model.path=...)" in refused("steps=3")


def test_command_that_does_not_exist(capsys):
    assert main(["trian"]) == 2
    assert "nearest is 'train'" in capsys.readouterr().err


def test_model_folder(refused, tmp_path):
    output = f"output_dir={tmp_path}/runs"
    assert "model.path '/no/model' is no folder" in refused(RECIPE, output, "model.path=/no/model")
    said = refused(RECIPE, output, "model.path=owner/name")
    assert "rlprm prepare recipe=NAME" in said
    assert "hf download owner/name --local-dir FOLDER" in said
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refused(RECIPE, output, f"model.path={tmp_path}/empty")
    (tmp_path / "empty/config.json").write_text("{}")
    assert "holds no weights" in refused(RECIPE, output, f"model.path={tmp_path}/empty")


def test_prm_folder(refused, model, tmp_path):
    said = refused(RECIPE, f"output_dir={tmp_path}", f"model.path={model}", "streams.process.source.model=/no/prm")
    assert "streams.process.source.model '/no/prm' is no folder" in said


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"frage": "1+1=", "answer": "2"}], "question"),  # the column that is missing
        ([], "rows.jsonl"),  # an empty file is named
        ([{"question": "1+1+1+1+1=", "answer": "5"}], "all 1 prompts of 'rows' are longer than max_prompt_tokens=8"),
    ],
    ids=["no such column", "empty", "all too long"],
)
def test_data(refused, model, tmp_path, rows, message):
    given = [f"model.path={model}", f"output_dir={tmp_path}/runs", *lines(tmp_path, *rows)]
    said = refused(*given)
    assert message in said
    # nothing is left that would make the corrected second try look like another run
    RunFolder(tmp_path / "runs/train/seed0", resume=False).close()
    (tmp_path / "rows.jsonl").unlink()
    assert "rows.jsonl" in refused(*given)


def test_output_folder(refused, model, tmp_path):
    given = [RECIPE, f"model.path={model}", "name=a"]
    (tmp_path / "a/seed0").mkdir(parents=True)
    (tmp_path / "a/seed0/metrics.jsonl").write_text("{}\n")
    said = refused(*given, f"output_dir={tmp_path}")
    assert "holds another run (metrics.jsonl)" in said
    assert "resume=auto" in said
    (tmp_path / "file").write_text("")
    assert "cannot be made" in refused(*given, f"output_dir={tmp_path}/file")
    with RunFolder(tmp_path / "b/seed0", resume=False):
        assert "is in use by process" in refused(RECIPE, f"model.path={model}", f"output_dir={tmp_path}", "name=b")


def test_too_little_shared_memory(refused, model, tmp_path):
    words = [RECIPE, f"model.path={model}", f"output_dir={tmp_path}", "placement.object_store_bytes=99999999999999"]
    assert "placement.object_store_bytes is 99999999999999 and shared memory has" in refused(*words)
