"""Every piece that `conf/` offers keeps the promises of its group; and the checks find pieces that do not."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from rlprm.contract import checks
from rlprm.contract.samples import sample
from rlprm.core.groups import known
from rlprm.parts import made
from tests.contract import options as listing

TASKS = ("chain_arithmetic", "worked_steps")  # gold answers of a form of their own: they have tests of their own
PIECES = [(group, option) for group in checks.CHECKS for option in listing.of_group(group)]


@pytest.mark.parametrize(("group", "option"), PIECES)
def test_piece_keeps_the_promises_of_its_group(group, option):
    checks.CHECKS[group](made(listing.content_of(group, option)))


@pytest.mark.parametrize("option", listing.of_group("normalizer"))
def test_normalizer_is_global_unless_it_says_otherwise(option):
    normalizer = made(listing.content_of("normalizer", option))
    if not checks.is_local(normalizer):
        checks.check_normalizer_is_global(normalizer)
        return
    given = sample()
    whole = checks.sharded(normalizer, given, 1)
    assert not torch.allclose(checks.sharded(normalizer, given, 5), whole), "said to be local, but it is not"


@pytest.mark.parametrize("option", listing.of_group("keep"))
def test_keep_rule(option):
    checks.check_keep(made(listing.content_of("keep", option)["rule"]))


@pytest.mark.parametrize("option", listing.of_group("policy_loss"))
def test_surrogate(option):
    checks.check_surrogate(made(listing.content_of("policy_loss", option)["surrogate"]))


@pytest.mark.parametrize("option", listing.of_group("verifier"))
def test_verifier_answers_or_fails_loudly(option):
    verify = made(listing.content_of("verifier", option)["function"])
    for gold, response in (("7", "7"), ("7", ""), ("7", "\n\n"), ("7", "so it is 8")):
        outcome, reason = verify(gold, response, "what is 3+4?")[:2] if option not in TASKS else (0.0, "x")
        assert outcome in (0.0, 1.0)
        assert reason
        assert response or outcome == 0.0, "an empty answer was paid"


@pytest.mark.parametrize("option", listing.of_group("data"))
def test_data_gives_rows_with_gold(option):
    content = listing.content_of("data", option)
    readers = [source["reader"] for source in content["train"].values()] + list(content["evaluation"].values())
    assert readers
    for reader in readers:
        rows = made(reader)
        assert rows[0].question.strip()
        assert rows[0].gold.strip()
        assert len({row.id for row in rows[:50]}) == min(len(rows), 50)


# `rollouts` reads what runs have stored, as token ids: tests/unit/data/test_stored.py
@pytest.mark.parametrize("option", [each for each in listing.of_group("examples") if each != "rollouts"])
def test_examples_are_pairs_of_text(option):
    part = listing.content_of("examples", option)
    pairs = made({**part, "size": 3} if "size" in part else part)
    assert all(isinstance(text, str) and text for pair in pairs for text in pair)


# -- the checks can fail ---------------------------------------------------------------------------------------------


def leaky(rewards, present, shard, reduce):
    return rewards * present


def made_up(rewards, present, shard, reduce):
    return torch.where(shard.response_mask, known(rewards, present) - 1.0, 0.0).to(rewards.dtype)


def blocks_of_four(rewards, present, shard, reduce):
    """Groups taken from the order of rows."""
    entries = known(rewards, present)
    means = entries.sum(1).cumsum(0) / 4
    return torch.where(present, entries - means[:, None], 0.0).to(rewards.dtype)


def divides_by_zero(rewards, present, shard, reduce):
    entries = known(rewards, present)
    return torch.where(present, entries / (shard.group == 4).logical_not().double()[:, None], 0.0).to(rewards.dtype)


@pytest.mark.parametrize("broken", [leaky, made_up, blocks_of_four, divides_by_zero])
def test_broken_normalizer_is_found(broken):
    with pytest.raises(AssertionError):
        checks.check_normalizer(broken)


def own_mean(rewards, present, shard, reduce):
    """Local statistics without saying so."""
    entries = known(rewards, present)
    return torch.where(present, entries - entries.sum() / present.sum().clamp_min(1), 0.0).to(rewards.dtype)


def test_local_statistics_are_found():
    checks.check_normalizer(own_mean)
    with pytest.raises(AssertionError):
        checks.check_normalizer_is_global(own_mean)


def test_other_broken_pieces_are_found():
    wrong = [
        ("estimator", lambda rewards, present, shard: known(rewards, present).float() / 2 + 0.1),
        ("estimator", lambda rewards, present, shard: rewards * 0),
        ("gate", lambda part, around: -part),
        ("gate", lambda part, around: 2 * part),
        ("merge", lambda streams, shard: {**streams, "process": streams["outcome"]}),
        ("splitter", lambda pieces: [len(pieces) + 1]),
        ("select", lambda rows, scores: [True] * len(rows)),
    ]
    for group, piece in wrong:
        with pytest.raises((AssertionError, ValueError, IndexError)):
            checks.CHECKS[group](piece)
    with pytest.raises(AssertionError):
        checks.check_keep(lambda group: True)
    with pytest.raises(AssertionError):
        checks.check_surrogate(lambda given: (-given.advantages * given.log_ratio.exp(), given.indicators()))
    with pytest.raises(AssertionError):  # half the gradient
        checks.check_surrogate(
            lambda given: (-given.masked().advantages * given.masked().log_ratio / 2, given.indicators())
        )


# -- a user's own piece ----------------------------------------------------------------------------------------------

OWN = '''
"""A normalizer of the user's own."""
from rlprm.core.groups import known
import torch


def halved(rewards, present, shard, reduce, *, by: float):
    return (known(rewards, present) / by).to(rewards.dtype)
'''


def test_own_normalizer_from_a_config_folder(tmp_path, monkeypatch):
    from rlprm.cli.compose import composed, groups
    from rlprm.config import TrainConfig, validated

    (tmp_path / "own_pieces.py").write_text(OWN)
    folder = tmp_path / "my_conf"
    (folder / "normalizer").mkdir(parents=True)
    (folder / "normalizer" / "halved.yaml").write_text(
        "# Divided by a number.\n_target_: own_pieces.halved\n_partial_: true\n# the number\nby: 2.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "halved" in groups(folder)["normalizer"]
    assert "halved" not in groups()["normalizer"]
    overrides = ["model.path=x", "normalizer@streams.process.normalizer=halved"]
    config = validated(TrainConfig, composed("train", overrides, folder).values)
    normalizer = made(config.streams["process"].normalizer)
    assert isinstance(normalizer, partial)
    assert normalizer.keywords == {"by": 2.0}
    checks.check_normalizer(normalizer)
    checks.check_normalizer_is_global(normalizer)
    with pytest.raises(ValueError, match=r"own_pieces\.halved takes no argument 'byy' .*nearest is 'by'"):
        validated(TrainConfig, composed("train", [*overrides, "+streams.process.normalizer.byy=1"], folder).values)
