from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console

from rlprm.actors.judge import Group
from rlprm.batch import Row
from rlprm.cli.compose import composed
from rlprm.cli.evaluate import document, reads, table
from rlprm.cli.main import main
from rlprm.config import EvaluateConfig, validated
from rlprm.core.metrics import check_name
from rlprm.errors import ConfigError
from rlprm.run.evaluating import Measured, described

RECIPE = "recipe=chain_arithmetic_cpu"


def rows(*outcomes: float | None, length: int, finish: str = "stop") -> tuple[Row, ...]:
    return tuple(
        Row(
            group=0, prompt_id="a", source="s", sample=n, outcome=outcome, reason="", finish=finish, prompt_length=1,
            response_length=length, num_steps=2, version=0, repetition=0.0, copy=False, fresh=False,
            train=False,
        )
        for n, outcome in enumerate(outcomes)
    )  # fmt: skip


def test_a_recipe_written_for_training_serves_evaluation():
    made = composed("evaluate", [RECIPE, "temperatures=[0,1]"], reads=reads)
    config = validated(EvaluateConfig, made.values)
    assert config.max_response_tokens == 48  # the recipe's, over the 64 of conf/evaluate.yaml
    assert made.origins["max_response_tokens"] == "chain_arithmetic_cpu/config.yaml"
    assert config.data.evaluation["chain_test"]["source"]["modulus"] == 7
    assert set(made.values) == set(EvaluateConfig.model_fields)
    assert set(made.values["model"]) == {"path", "dtype"}
    assert "train" not in made.values["data"]
    assert "weight_transport" not in made.values["placement"]


def test_a_misspelt_key_in_a_file_is_not_dropped(tmp_path):
    (tmp_path / "placement").mkdir()
    (tmp_path / "placement/own.yaml").write_text("defaults: [cpu, _self_]\nenginess: 2\n")
    made = composed("evaluate", [RECIPE, "placement=own"], tmp_path, reads)
    with pytest.raises(ConfigError, match=r"placement\.enginess: unknown key; nearest is 'engines'"):
        validated(EvaluateConfig, made.values)


def test_what_evaluation_takes_from_training_data_may_be_set():
    made = composed("evaluate", [RECIPE, "data.train.chain.reader.source.modulus=11"], reads=reads)
    assert made.values["data"]["evaluation"]["chain_test"]["source"]["modulus"] == 11


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("steps=3", "rlprm evaluate does not read steps"),
        ("method=ppo", "rlprm evaluate does not read method"),
        ("model.attention=eager", "does not read model.attention"),
        ("data.train.chain.reader.source.size=3", "does not read data.train.chain.reader.source.size"),
        ("temperture=1", "nearest is 'temperatures'"),
        ("stepz=3", "there is no such key in conf/evaluate.yaml"),
        ("temperatures=[0,0]", "names one twice"),
        ("temperatures=[]", "temperatures: found 'list'"),
        ("samples=0", "samples: found 0"),
        ("~data.evaluation.chain_test", "data.evaluation"),
        ("placement.policy_ranks=2", "does not read placement.policy_ranks"),
        ("placement.weight_transport=gloo", "does not read placement.weight_transport"),
        ("placement.collective_timeout_s=9.0", "does not read placement.collective_timeout_s"),
        ("placement.enginess=2", "placement.enginess: there is no such key"),
        ("+placement.enginess=2", "placement.enginess: unknown key; nearest is 'engines'"),
        ("output=/no/folder/a.json", "there is no folder /no/folder"),
        ("model.path=/no/model", "model.path '/no/model' is no folder"),
    ],
)
def test_a_bad_word_is_named(capsys, word, message):
    assert main(["evaluate", RECIPE, word]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1


def test_training_data_need_not_be_there(capsys):
    assert main(["evaluate", "data=gsm8k", "model.path=/no/model"]) == 1
    assert "no value for data.evaluation.gsm8k_test.path;" in capsys.readouterr().err


def test_no_result_is_overwritten(capsys, tmp_path):
    (tmp_path / "a.json").write_text("precious")
    assert main(["evaluate", RECIPE, f"output={tmp_path}/a.json"]) == 1
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "a.json").read_text() == "precious"


def test_help_and_cfg_tell_what_is_read(capsys):
    assert main(["evaluate", "--help"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^  verifier +chain_arithmetic, exact", said, re.MULTILINE)
    assert re.search(r"^  temperatures: .* 0 is greedy", said, re.MULTILINE)
    assert not re.search(r"^  (normalizer|cluster|dataset) ", said, re.MULTILINE)
    assert main(["evaluate", RECIPE, "--cfg"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^samples = 4 +# evaluate.yaml$", said, re.MULTILINE)
    assert "policy" not in said


def test_numbers_beside_the_accuracy_have_listed_names():
    # two prompts, two responses each, lengths 4, 4, 10, 10: mean 7; one of four without verdict; two of four cut off
    groups = [
        Group(index=0, keep=True, rows=rows(1.0, None, length=4), reference=None),
        Group(index=1, keep=True, rows=rows(0.0, 1.0, length=10, finish="length"), reference=None),
    ]
    found = described(groups, "s")
    assert found == {
        "val-aux/s/num_prompts": 2.0,
        "val-aux/s/frac_absent": 0.25,
        "val-aux/s/response_length/mean": 7.0,
        "val-aux/s/response_length/clip_ratio": 0.5,
        "process_steps/mean": 2.0,
    }
    for name in found:
        check_name(name)


def test_table_and_document():
    aux = described([Group(index=0, keep=True, rows=rows(1.0, 0.0, length=3), reference=None)], "s")
    found = [
        Measured(source="s", temperature=0.0, samples=1, metrics={"val-core/s/accuracy/greedy": 0.25, **aux}),
        Measured(
            source="s",
            temperature=0.5,
            samples=2,
            metrics={"val-core/s/accuracy/mean@2": float("nan"), "val-core/s/accuracy/pass@2": 0.75, **aux},
        ),
    ]
    screen = io.StringIO()
    Console(file=screen, width=80).print(table(found))
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in screen.getvalue().splitlines()]
    assert ["greedy", "1", "25.0%", "", "0.0%", "3.0", "0.0%", "2.0"] in cells
    assert ["0.5", "2", "no verdicts", "75.0%", "0.0%", "3.0", "0.0%", "2.0"] in cells
    made = composed("evaluate", [RECIPE], reads=reads)
    written = document(validated(EvaluateConfig, made.values), made.values, found)
    again = json.loads(json.dumps(written, allow_nan=False))
    assert [one["temperature"] for one in again["results"]] == [0.0, 0.5]
    assert again["results"][0]["metrics"]["val-core/s/accuracy/greedy"] == 0.25
    assert again["results"][1]["metrics"]["val-core/s/accuracy/mean@2"] is None  # strict JSON has no NaN
    assert again["config"]["samples"] == 4
