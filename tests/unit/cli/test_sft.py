"""`rlprm sft` takes the keys it reads, from groups that it shares with `rlprm train`, and no others."""

from __future__ import annotations

import pytest

from rlprm.cli.compose import composed
from rlprm.cli.main import main
from rlprm.cli.sft import reads
from rlprm.config import SftConfig, validated

GIVEN = ["model.path=somewhere", "output=elsewhere"]


@pytest.mark.parametrize("placement", ["cpu", "cpu_two_ranks", "gpu1", "gpu8"])
def test_shared_groups_lose_what_fine_tuning_does_not_read(placement):
    made = composed("sft", [*GIVEN, f"placement={placement}"], reads=reads)
    config = validated(SftConfig, made.values)
    assert not {"epochs", "mini_batches"} & set(made.values["learner"])
    assert not {"engines", "prm_ranks", "weight_transport"} & set(made.values["placement"])
    # what starts Ray asks for the learner's processes alone
    assert (config.placement.prm_ranks, config.placement.engines, config.placement.gpus_per_engine) == (0, 0, 0.0)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("learner.epochs=3", "rlprm sft does not read learner.epochs"),
        ("learner.mini_batches=3", "rlprm sft does not read learner.mini_batches"),
        ("placement.engines=2", "rlprm sft does not read placement.engines"),
        ("placement.prm_ranks=2", "rlprm sft does not read placement.prm_ranks"),
        ("placement.gpus_per_engine=0.5", "rlprm sft does not read placement.gpus_per_engine"),
        ("placement.tensor_parallel=2", "rlprm sft does not read placement.tensor_parallel"),
        ("placement.weight_transport=gloo", "rlprm sft does not read placement.weight_transport"),
        ("placement.weight_bucket_bytes=7", "rlprm sft does not read placement.weight_bucket_bytes"),
        ("learner.lrr=1e-3", "nearest is 'learner.lr'"),
        ("+learner.lrr=1e-3", "learner.lrr: unknown key; nearest is 'lr'"),
        ("+placement.polcy_ranks=2", "placement.polcy_ranks: unknown key; nearest is 'policy_ranks'"),
        ("learner.warmup=1000 learner.schedule=linear", "learner: schedule linear has warmup 1000 and 1000"),
        ("placement.device=cuda", "device cuda with gpus_per_rank 0.0"),
        ("batch_size=0", "batch_size: found 0"),
        ("model.path=owner/name", "model.path 'owner/name' is no folder"),
    ],
)
def test_a_bad_word_is_named(capsys, tmp_path, word, message):
    assert main(["sft", "model.path=somewhere", f"output={tmp_path}/out", *word.split()]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_cfg_shows_what_is_read(capsys):
    assert main(["sft", *GIVEN, "--cfg"]) == 0
    said = capsys.readouterr().out
    assert "learner.lr = 6e-05" in said
    assert "learner.epochs" not in said
    assert "placement.engines" not in said
