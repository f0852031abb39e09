"""`rlprm prm` takes the keys it reads, and says before anything starts what cannot work."""

from __future__ import annotations

import pytest

from rlprm.cli.compose import composed
from rlprm.cli.main import main
from rlprm.cli.prm import reads
from rlprm.config import validated
from rlprm.config_prm import PrmConfig

GIVEN = ["model.path=somewhere", "output=elsewhere"]


@pytest.mark.parametrize("form", ["token_classification", "qwen_prm", "reasonflux", "fin_prm"])
@pytest.mark.parametrize("placement", ["cpu", "gpu8"])
def test_formats_with_a_classification_head_can_be_trained(form, placement):
    values = composed("prm", [*GIVEN, f"prm_format@format={form}", f"placement={placement}"], reads=reads).values
    config: PrmConfig = validated(PrmConfig, values)
    assert not {"epochs", "mini_batches"} & set(values["learner"])
    assert not {"engines", "prm_ranks"} & set(values["placement"])
    assert config.placement.prm_ranks == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "prm_format@format=rlhflow",
            "format reads the vocabulary head of a model, and rlprm prm trains a classification",
        ),
        ("prm_format@format=math_shepherd", "format reads the vocabulary head of a model"),
        ("prm_format@format=skywork", "format reads the value head of a model"),
        ("learner.epochs=3", "rlprm prm does not read learner.epochs"),
        ("placement.engines=2", "rlprm prm does not read placement.engines"),
        ("labelled@solutions=jsonl", "no value for solutions.path"),
        ("learner.warmup=1000 learner.schedule=linear", "learner: schedule linear has warmup 1000 and 400"),
        ("recipe=chain_arithmetic_cpu", "recipe 'chain_arithmetic_cpu' has no step_labels.yaml"),
        ("recipe=nothing", "recipe 'nothing' does not exist"),
        ("model.path=owner/name", "model.path 'owner/name' is no folder"),
    ],
)
def test_a_bad_word_is_named(capsys, tmp_path, words, message):
    assert main(["prm", "model.path=somewhere", f"output={tmp_path}/out", *words.split()]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_recipe_with_labels_gives_its_model_and_settings(capsys):
    assert main(["prm", "recipe=chain_arithmetic_hard_cpu", "--cfg"]) == 0
    said = capsys.readouterr().out
    assert "learner.lr = 0.001" in said
    assert "recipes/chain_arithmetic_hard_cpu/model" in said
    values = composed("prm", ["recipe=chain_arithmetic_hard_cpu"], reads=reads).values
    validated(PrmConfig, values)
