"""Flow rewards on a tiny real model: prices, learning, repeatability, and what a checkpoint brings back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rlprm.engine.flow import FlowNetwork
from rlprm.errors import CheckpointError, ConfigError
from rlprm.sources.base import OWN
from rlprm.sources.flow import FlowReward, rows_of
from tests.integration import tiny_models
from tests.unit.made import context, scorable, shard

SETTINGS = {
    "percentiles": [0.0, 1.0],
    "condition": "next",
    "width": 32,
    "depth": 2,
    "taus": [0.8],
    "threshold": 0.6,
    "keep": 2,
    "price": 0.01,
    "learn_at": "reward",
    "lr": 3e-3,
    "betas": [0.9, 0.999],
    "weight_decay": 0.01,
    "epochs": 1,
    "quiet": 0,
    "initial": None,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.folder(tmp_path_factory.mktemp("model"), 0, True)


def source(folder, *, layout="padded", **changes):
    return FlowReward(context(model=folder, token_budget=16, layout=layout), **(SETTINGS | changes))


def given(step=1):
    return scorable(shard([5, 6, 4], [1.0, 0.0, 1.0], groups=[0, 0, 0]), step=step)


def test_few_tokens_are_punished_and_the_last_has_no_deviation(folder):
    stream = source(folder).score(given()).streams[OWN]
    assert stream.present.sum(1).tolist() == [4, 5, 3]  # all response tokens but the last
    assert (stream.rewards <= 0).all()
    assert ((stream.rewards < 0).sum(1) <= 2).all()
    assert stream.rewards.amin(1).tolist() == pytest.approx([-0.01] * 3)  # the most deviating one pays in full
    assert not stream.rewards[~stream.present].any()


def test_rewards_repeat_whatever_the_layout_and_company_and_change_with_the_step(folder):
    made = source(folder)
    first = made.score(given()).streams[OWN].rewards
    assert torch.equal(first, made.score(given()).streams[OWN].rewards)
    assert torch.allclose(first, source(folder, layout="packed").score(given()).streams[OWN].rewards, atol=1e-6)
    alone = made.score(replace(given(), shard=rows_of(given().shard, torch.tensor([1])))).streams[OWN].rewards
    assert torch.allclose(first[1], alone[0], atol=1e-6)
    assert not torch.equal(first, made.score(given(step=2)).streams[OWN].rewards)


@pytest.mark.parametrize("act", ["score", "learn"])
def test_each_noise_level_has_noise_of_its_own(folder, monkeypatch: pytest.MonkeyPatch, act: str):
    seen: list[tuple[float, float, torch.Tensor]] = []
    whole = FlowNetwork.errors

    def watched(network, target, condition, noise, tau, layer):
        seen.append((float(tau[0]), layer, noise))
        return whole(network, target, condition, noise, tau, layer)

    monkeypatch.setattr(FlowNetwork, "errors", watched)
    getattr(source(folder, taus=[0.5, 0.8]), act)(given())
    once = seen.copy()
    seen.clear()
    getattr(source(folder, taus=[0.8, 0.5]), act)(given())

    def by_level(calls):
        return {
            level: torch.cat([noise.flatten() for *where, noise in calls if tuple(where) == level])
            for level in {(tau, layer) for tau, layer, _ in calls}
        }

    first, second = by_level(once), by_level(seen)
    assert len(first) == 4  # two noise levels at two depths
    assert len({tuple(noise.tolist()) for noise in first.values()}) == 4
    assert all(torch.equal(first[level], second[level]) for level in first)


@pytest.mark.parametrize("learn_at", ["reward", "uniform"])
def test_it_learns_from_right_responses_only(folder, learn_at):
    made = source(folder, learn_at=learn_at)
    losses = [made.learn(given(step)).partial["flow/loss"].value for step in range(30)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    wrong = replace(given(), shard=rows_of(given().shard, torch.tensor([1])))
    before = [each.clone() for each in made._network.parameters()]
    assert made.learn(wrong).agreed == {}
    assert all(torch.equal(a, b) for a, b in zip(before, made._network.parameters(), strict=True))


def test_quiet_steps_pay_nothing(folder):
    made = source(folder, quiet=1)
    assert not made.score(given()).streams[OWN].present.any()
    made.learn(given())
    assert made.score(given()).streams[OWN].present.any()


def test_a_loaded_source_goes_on_bit_by_bit(folder, tmp_path):
    made = source(folder)
    made.learn(given(1))
    made.save(str(tmp_path))
    again = source(folder)
    again.load(str(tmp_path))
    for each in (made, again):
        each.learn(given(2))
    assert torch.equal(made.score(given(3)).streams[OWN].rewards, again.score(given(3)).streams[OWN].rewards)
    started = source(folder, initial=str(tmp_path / "flow.pt"))
    assert started._steps == 1
    with pytest.raises(CheckpointError, match="same model, width and depth"):
        source(folder, width=16).load(str(tmp_path))
    with pytest.raises(CheckpointError, match="cannot be read"):
        source(folder).load(str(tmp_path / "nowhere"))


def test_settings_that_cannot_work_are_refused():
    FlowReward.check(model="x", learner=False, **SETTINGS)
    for change, message in (
        ({"keep": 0}, "keep is 0"),
        ({"taus": [1.0]}, "between 0 and 1"),
        ({"taus": []}, "expected 1 or more"),
        ({"epochs": 0}, "epochs is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            FlowReward.check(model="x", learner=False, **SETTINGS | change)
    with pytest.raises(ConfigError, match="set model to the folder"):
        FlowReward.check(model=None, learner=False, **SETTINGS)
