from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from rlprm.core.credit import CriticPlan, StreamPlan, credit, kl_stream, outcome_stream
from rlprm.core.estimators import gae, none, to_go
from rlprm.core.gates import open_gate, sign_consistent, trust_gate
from rlprm.core.merge import separate, sum_into
from rlprm.core.metrics import check_name
from rlprm.core.normalize import RAW, normalize
from rlprm.core.probe import probe
from rlprm.core.reduce import Identity
from rlprm.errors import ConfigError
from rlprm.records import Stream
from tests.unit.core.worked import NO_AXES, close, example, off_response, on_response, process_stream, shard_of

RLOO = partial(normalize, **{**NO_AXES, "unit": "response", "centre": "leave_one_out"})
PRIME = {"order": "scale_then_centre", "eps": 1e-6}
WRITTEN = partial(normalize, **{**NO_AXES, "centre": "token_mean_loo", "scale": "return_range", **PRIME})
RELEASED = partial(
    normalize, **{**NO_AXES, "centre": "token_mean_loo_released", "scale": "local_return_range", **PRIME}
)
TO_GO = partial(to_go, gamma=1.0)


def plan(name, normalizer, **settings):
    defaults = {"merge": separate, "estimator": TO_GO, "weight": 1.0, "gate": open_gate}
    return StreamPlan(**{"name": name, "normalizer": normalizer, **defaults, **settings})


def run(shard, streams, plans, whiten="none", **settings):
    return credit(shard, streams, plans, Identity(), whiten=whiten, trust=settings.pop("trust", {}), **settings)


def prime(normalizer, whiten="none", weight=1.0, process=None):
    shard = example()
    streams = {"outcome": outcome_stream(shard), "process": process or process_stream(shard)}
    return shard, run(
        shard, streams, [plan("outcome", RLOO, weight=weight), plan("process", normalizer, weight=weight)], whiten
    )


def test_prime_as_written():
    shard, found = prime(WRITTEN)
    expected = [[-0.416664, -0.333331], [-2.187497, -1.874998, -2.062497], [1.354165]]
    close(off_response(found.advantages.total, shard), expected)


def test_prime_as_released_before_and_after_whitening():
    shard, found = prime(RELEASED)
    expected = [[-0.416664, -0.520831], [-2.187497, -1.916664, -2.395830], [1.354165]]
    close(off_response(found.advantages.total, shard), expected)
    # mean -1.013887, std_b 1.435965 over the six tokens: (-0.416664 + 1.013887) / 1.435965 = 0.415911
    shard, found = prime(RELEASED, "full")
    expected = [[0.415911, 0.343369], [-0.817313, -0.628702, -0.962398], [1.649133]]
    close(off_response(found.advantages.total, shard), expected)


def test_verl_recipe_is_the_released_form_without_the_last_token_and_weights_of_5():
    # the last token's reward is a present 0: it counts in the token means; 0.4 is still the largest return
    shard = example()
    cut = Stream(rewards=on_response(shard, [[0.2, 0.0], [0.1, 0.3, 0.0], [0.0]]), present=shard.response_mask)
    shard, found = prime(RELEASED, weight=5.0, process=cut)
    expected = [[3.333331, 1.041670], [-1.875008, -2.291673, -6.458330], [1.041670]]
    close(off_response(found.advantages.total, shard), expected, 2e-5)
    shard, found = prime(RELEASED, "full", weight=5.0, process=cut)
    expected = [[1.220616, 0.554827], [-0.292546, -0.413599, -1.624125], [0.554827]]
    close(off_response(found.advantages.total, shard), expected)


def test_grpo_with_process_supervision():
    # all six step rewards z-scored together, then summed to go
    shard = example()
    z = partial(normalize, **{**NO_AXES, "unit": "step", "centre": "group", "scale": "group_std",
                              "order": "centre_then_scale", "eps": 1e-6})  # fmt: skip
    found = run(shard, {"process": process_stream(shard)}, [plan("process", z)])
    expected = [[-0.575552, -0.935272], [-0.647496, -0.575552, -1.366936], [1.223048]]
    close(off_response(found.advantages.total, shard), expected, 1e-5)


def test_reinforce_plus_plus_baseline():
    # outcome minus group mean on every token: 1/3 three times, -2/3 three times; mean -1/6, var_b 0.3 -> +-0.912871
    shard = example()
    mean = partial(normalize, **{**NO_AXES, "unit": "response", "centre": "group"})
    found = run(shard, {"outcome": outcome_stream(shard)}, [plan("outcome", mean)], "full")
    close(off_response(found.advantages.total, shard), [[0.912871] * 2, [-0.912871] * 3, [0.912871]])


def test_metrics_of_the_worked_example():
    _, found = prime(WRITTEN, "full")
    for name in found.metrics:
        check_name(name)
    told = found.metrics
    # process: six rewards, mean 0.7/6; outcomes 1, 0, 1
    assert told["reward/process/mean"] == pytest.approx(0.116667, abs=1e-6)
    assert (told["reward/process/min"], told["reward/process/max"]) == pytest.approx((-0.2, 0.4))
    assert told["reward/process/std"] == pytest.approx(0.231661, abs=1e-6)
    assert told["reward/outcome/mean"] == pytest.approx(2 / 3)
    assert told["reward/outcome/std"] == pytest.approx(0.577350, abs=1e-6)
    assert told["reward/outcome/frac_present"] == 1.0
    assert told["reward/outcome/frac_zero_std"] == 0.0
    assert told["adv/outcome/share"] + told["adv/process/share"] == pytest.approx(1.0, abs=1e-6)


def test_share_golden():
    # two one-token responses; parts a = (1, -1), b = (3, -3), total (4, -4): cov(a, total)/var(total) = 4/16
    shard = shard_of([1, 1], [1.0, 0.0])
    one, three = (Stream(rewards=on_response(shard, [[k], [-k]]), present=shard.response_mask) for k in (1.0, 3.0))
    told = run(shard, {"a": one, "b": three}, [plan("a", RAW), plan("b", RAW)]).metrics
    assert (told["adv/a/share"], told["adv/b/share"]) == (0.25, 0.75)
    assert told["adv/b/std"] == pytest.approx(18**0.5)
    assert (told["adv/b/mean"], told["adv/b/abs_mean"]) == (0.0, 3.0)


def test_absent_flat_and_lone_are_told_apart():
    # group 0: 1, 1 (flat); group 1: 0 and an absent one (lone, hence flat); group 2: all absent (no group)
    shard = shard_of([1] * 5, [1.0, 1.0, 0.0, None, None], groups=[0, 0, 1, 1, 2])
    told = run(shard, {"outcome": outcome_stream(shard)}, [plan("outcome", RLOO)]).metrics
    assert told["reward/outcome/frac_present"] == pytest.approx(3 / 5)
    assert told["reward/outcome/frac_zero_std"] == 1.0
    assert told["reward/outcome/frac_lone"] == pytest.approx(1 / 3)


def test_a_stream_without_rewards_tells_only_that():
    shard = shard_of([1, 1], [None, None])
    found = run(shard, {"outcome": outcome_stream(shard)}, [plan("outcome", RLOO)], "full")
    assert {k: v for k, v in found.metrics.items() if k.startswith("reward/")} == {"reward/outcome/frac_present": 0.0}
    assert found.advantages.total.abs().sum() == 0


def test_rows_that_do_not_train_change_nothing():
    alone = example()
    both = shard_of([2, 3, 1, 3], [1.0, 0.0, 1.0, 1.0], groups=[5, 5, 5, 6])
    both = replace(both, train=torch.tensor([True, True, True, False]))
    streams = lambda shard, rows: {  # noqa: E731
        "outcome": outcome_stream(shard),
        "process": Stream(rewards=on_response(shard, rows), present=shard.response_mask),
    }
    rows = [[0.2, -0.1], [0.1, 0.3, -0.2], [0.4]]
    plans = [plan("outcome", RLOO), plan("process", WRITTEN)]
    small = run(alone, streams(alone, rows), plans, "full")
    large = run(both, streams(both, [*rows, [9.0, 9.0, 9.0]]), plans, "full")
    torch.testing.assert_close(large.advantages.total[:3], small.advantages.total)
    assert large.advantages.total[3].abs().sum() == 0
    assert large.metrics == pytest.approx(small.metrics)


def test_streams_and_plans_must_match_by_name():
    shard = example()
    streams = {"outcome": outcome_stream(shard), "process": process_stream(shard)}
    with pytest.raises(ConfigError, match="give every stream a plan"):
        run(shard, streams, [plan("outcome", RLOO)])
    with pytest.raises(ConfigError, match="give every stream a plan"):
        run(shard, {"outcome": streams["outcome"]}, [plan("outcome", RLOO), plan("process", RAW)])
    with pytest.raises(ConfigError, match="named once"):
        run(shard, streams, [plan("outcome", RLOO), plan("outcome", RLOO)])
    merge = partial(sum_into, name="process", into="outcome", weight=1.0)
    found = run(shard, streams, [plan("outcome", RLOO, merge=merge)])
    # sums 1.1, 0.2, 1.4: RLOO 1.1 - 0.8, 0.2 - 1.25, 1.4 - 0.65
    close(off_response(found.advantages.total, shard), [[0.3] * 2, [-1.05] * 3, [0.75]])


def test_gates_see_the_outcome_part_and_the_trust():
    shard = example()
    streams = {"outcome": outcome_stream(shard), "process": process_stream(shard)}
    signed = run(shard, streams, [plan("outcome", RLOO), plan("process", RAW, estimator=none, gate=sign_consistent)])
    # outcome parts +, -, +: y1 keeps 0.2, y2 keeps -0.2, y3 keeps 0.4
    close(off_response(signed.advantages.parts["process"], shard), [[0.2, 0.0], [0.0, 0.0, -0.2], [0.4]])
    trusted = [plan("outcome", RLOO), plan("process", RAW, estimator=none, gate=trust_gate)]
    found = run(shard, streams, trusted, trust={"process": 0.5})
    close(off_response(found.advantages.parts["process"], shard), [[0.1, -0.05], [0.05, 0.15, -0.1], [0.2]])


def test_outcome_stream_sits_on_the_last_response_token_and_only_where_judged():
    shard = shard_of([2, 3, 1], [1.0, 0.0, None])
    stream = outcome_stream(shard)
    assert stream.present.nonzero().tolist() == [[0, 2], [1, 3]]
    assert stream.rewards.nonzero().tolist() == [[0, 2]]


def test_kl_stream_is_minus_k1_and_detached():
    shard = example()
    old = on_response(shard, [[-1.0, -2.0], [-1.0] * 3, [-1.0]]).requires_grad_()
    stream = kl_stream(old, on_response(shard, [[-1.5, -1.0], [-1.0] * 3, [-3.0]]), shard)
    close(off_response(stream.rewards, shard), [[-0.5, 1.0], [0.0] * 3, [-2.0]])
    assert not stream.rewards.requires_grad
    with pytest.raises(ConfigError, match="never normalized"):
        plan("kl", RLOO)
    assert plan("kl", RAW).name == "kl"


def test_critic_parts_sum_to_the_usual_gae():
    shard = shard_of([3, 2], [1.0, 0.0])
    streams = {"outcome": outcome_stream(shard), "process": Stream(
        rewards=on_response(shard, [[0.1, 0.3, -0.2], [0.4, 0.5]]), present=shard.response_mask)}  # fmt: skip
    values = on_response(shard, [[0.5, 0.6, 0.7], [0.1, 0.2]])
    plans = [plan("outcome", RAW, estimator=none), plan("process", RAW, estimator=none, weight=0.5)]
    critic = CriticPlan(gamma=0.9, lam=0.95)
    found = run(shard, streams, plans, values=values, critic=critic)
    summed = on_response(shard, [[0.05, 0.15, 0.9], [0.2, 0.25]])
    advantages, targets = gae(summed, values, shard.response_mask, 0.9, 0.95)
    torch.testing.assert_close(found.advantages.total, advantages)
    torch.testing.assert_close(found.value_targets, targets)
    assert set(found.advantages.parts) == {"outcome", "process", "baseline"}
    assert "adv/baseline/share" in found.metrics


def tried(plans, critic, **sources):
    probe(plans, critic, whiten="full", sources={"outcome": "whole", **sources}, trusted=[])


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"estimator": TO_GO}, "GAE accumulates"), ({"estimator": none, "gate": sign_consistent}, "not linear")],
)
def test_a_critic_refuses_what_it_cannot_be_the_baseline_of(settings, message):
    with pytest.raises(ConfigError, match=message):
        tried([plan("outcome", RAW, **settings)], CriticPlan(gamma=1.0, lam=1.0))


def test_values_and_critic_come_together():
    shard = example()
    with pytest.raises(ConfigError, match="only one of the two"):
        run(shard, {"outcome": outcome_stream(shard)}, [plan("outcome", RAW, estimator=none)],
            values=torch.zeros_like(shard.rollout_logprobs))  # fmt: skip


def test_probe_finds_bad_settings_before_anything_is_loaded():
    merge = partial(sum_into, name="process", into="outcome", weight=1.0)
    tried([plan("outcome", RLOO, merge=merge)], None, process="token")
    tried([plan("outcome", RAW, estimator=none)], CriticPlan(gamma=1.0, lam=0.95))
    with pytest.raises(ConfigError, match=r"gamma is 2\.0"):
        tried([plan("outcome", RLOO, estimator=partial(to_go, gamma=2.0))], None)
    with pytest.raises(ConfigError, match="give every stream a plan"):
        tried([plan("outcome", RLOO)], None, process="token")
    with pytest.raises(ConfigError, match="`outcome`"):
        probe(
            [plan("process", RAW, gate=sign_consistent)], None, whiten="full", sources={"process": "step"}, trusted=[]
        )
    with pytest.raises(ConfigError, match="needs a centre"):
        plan("outcome", partial(normalize, **{**NO_AXES, "scale": "group_std", "eps": 1e-6}))
