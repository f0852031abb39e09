"""`rlprm dpo` takes the keys it reads and no others, and says at once what it cannot learn from."""

from __future__ import annotations

import pytest

from rlprm.cli.compose import composed
from rlprm.cli.dpo import reads
from rlprm.cli.main import main
from rlprm.config import validated
from rlprm.config_dpo import DpoConfig

GIVEN = ["model.path=somewhere", "output=elsewhere", "runs=[one,two]"]


@pytest.mark.parametrize("placement", ["cpu", "cpu_two_ranks", "gpu1", "gpu8"])
def test_shared_groups_lose_what_is_not_read(placement):
    config = validated(DpoConfig, composed("dpo", [*GIVEN, f"placement={placement}"], reads=reads).values)
    assert config.runs == ["one", "two"]
    assert (config.placement.prm_ranks, config.placement.engines) == (0, 0)
    assert config.learner.lr > 0


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("learner.epochs=3", "rlprm dpo does not read learner.epochs"),
        ("placement.engines=2", "rlprm dpo does not read placement.engines"),
        ("beta=0", "beta: found 0"),
        ("pairs_per_prompt=0", "pairs_per_prompt: found 0"),
        ("preference=ipo", "preference=ipo: there is no such option (there are: dpo, step_dpo, weighted_dpo)"),
        ("preference.steps=labels", "preference.steps"),  # of step_dpo alone
        ("recipe=chain_arithmetic_cpu", "recipes are written for runs"),
        ("learner.warmup=100 learner.schedule=linear", "learner: schedule linear has warmup 100 and 100"),
        ("model.path=owner/name", "model.path 'owner/name' is no folder"),
    ],
)
def test_a_bad_word_is_named(capsys, tmp_path, word, message):
    assert main(["dpo", "model.path=somewhere", "runs=r", f"output={tmp_path}/out", *word.split()]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
