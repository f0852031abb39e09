"""One rank of the policy: credit, the loss of a micro-batch and its metrics, by hand; the model is a table."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from rlprm.core.credit import CriticPlan, StreamPlan
from rlprm.core.estimators import none, to_go
from rlprm.core.gates import open_gate
from rlprm.core.kl import TrustRegion
from rlprm.core.merge import separate
from rlprm.core.normalize import RAW
from rlprm.core.policy_loss import ppo_clip
from rlprm.core.policy_loss_free import reinforce
from rlprm.core.policy_loss_sequence import gspo
from rlprm.core.reduce import Identity
from rlprm.engine.batching import Passes
from rlprm.engine.combine import global_numbers
from rlprm.engine.critic import Critic
from rlprm.engine.policy import Objective, Policy
from tests.unit.made import TableLearner, shard

LOO = partial(RAW, unit="response", centre="leave_one_out")


def plan(name="outcome", normalizer=LOO, estimator=None, weight=1.0) -> StreamPlan:
    estimator = estimator or partial(to_go, gamma=1.0)
    return StreamPlan(
        name=name, merge=separate, normalizer=normalizer, estimator=estimator, weight=weight, gate=open_gate
    )


def passes(**changes) -> Passes:
    return Passes(**{"epochs": 1, "mini_batches": 1, "token_budget": 64, "layout": "padded", "seed": 0, **changes})


def policy(learner, *, plans=None, critic=None, each=None, **objective) -> Policy:
    settings = {
        "surrogate": partial(ppo_clip, clip_low=0.2, clip_high=0.2, dual_clip=None),
        "aggregation": "token-mean",
        "horizon": None,
        "kl_weight": 0.0,
        "kl_kind": "k2",
        "entropy_weight": 0.0,
        "trust": None,
        "mismatch_mode": "none",
        "mismatch_cap": None,
        "mismatch_low": None,
        **objective,
    }
    return Policy(
        learner,
        critic,
        plans=plans or [plan()],
        built_in=[each.name for each in plans or [plan()] if each.name in ("outcome", "kl")],
        whiten="none",
        objective=Objective(**settings),
        passes=each or passes(),
        temperature=1.0,
        reduce=Identity(),
        tokenizer=None,
        readable_groups=0,
    )


# Two responses of 2 and 1 tokens after one prompt token each; flat: prompt, t1, t2, prompt, t3.
LOGPROBS = [-1.0, -2.0, -0.5]
ENTROPY = [0.5, 1.0, 1.5]
TABLE = torch.tensor([0.0, -1.0, -2.0, 0.0, -0.5])
ADVANTAGES = torch.tensor([math.nan, 1.0, -1.0, math.nan, 2.0])  # nothing is read on the prompt
EVERY = torch.tensor([True, True])


def two():
    return shard([2, 1], [1.0, 0.0])


def learnt(old, *, ref=None, selected=EVERY, advantages=ADVANTAGES, each=None, **objective):
    learner = TableLearner(LOGPROBS, entropy=ENTROPY)
    made = policy(learner, each=each, **objective)
    found = made.learn(two(), selected, old, ref, {"advantages": advantages}, num_groups=1)
    return learner, global_numbers([found])


def ratio_of(value: float) -> torch.Tensor:
    """pi_old such that the ratio is this on every token."""
    return TABLE - math.log(value)


def test_token_mean_loss_by_hand():
    learner, found = learnt(ratio_of(1.1))
    # -(1.1 * 1 + 1.1 * -1 + 1.1 * 2) / 3
    assert learner.losses == pytest.approx([-2.2 / 3])
    # d(-ratio A / 3) / d log pi = -1.1 A / 3
    assert learner.gradients[0].tolist() == pytest.approx([0.0, -1.1 / 3, 1.1 / 3, -2.2 / 3])
    assert found == pytest.approx(
        {
            "actor/pg_loss": -2.2 / 3,
            "actor/entropy": 1.0,
            "actor/ratio": 1.1,
            "actor/ratio_max": 1.1,
            "actor/ratio_first_diff": 0.1,
            "actor/pg_clipfrac": 0.0,
            "actor/pg_clipfrac_lower": 0.0,
            "actor/ppo_kl": -math.log(1.1),
            "actor/grad_norm": 1.0,
            "actor/lr": 0.1,
            "actor/updates": 1.0,
        },
        abs=1e-6,
    )


def test_clipped_tokens_do_not_move():
    learner, found = learnt(ratio_of(1.5))
    # A > 0 is clipped at 1.2; A < 0 is not: -(1.2 - 1.5 + 2.4) / 3
    assert learner.losses == pytest.approx([-2.1 / 3])
    assert learner.gradients[0].tolist() == pytest.approx([0.0, 0.0, 0.5, 0.0])
    assert found["actor/pg_clipfrac"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("aggregation", "horizon", "loss"),
    [
        # ratio 1: token losses [-1, 1] and [-2]
        ("token-mean", None, -2 / 3),
        ("seq-mean-token-mean", None, (0 - 2) / 2),
        ("seq-mean-token-sum", None, (0 - 2) / 2),
        ("seq-mean-token-sum-norm", 8, (0 - 2) / 16),
        ("token-sum", None, -2.0),
    ],
)
def test_aggregation(aggregation, horizon, loss):
    learner, _ = learnt(TABLE, aggregation=aggregation, horizon=horizon)
    assert learner.losses == pytest.approx([loss])


@pytest.mark.parametrize(("kind", "each"), [("k2", 0.02), ("k3", 0.018731), ("straight_through", 0.018731)])
def test_kl_loss_is_added_with_its_weight(kind, each):
    learner, found = learnt(TABLE, ref=TABLE - 0.2, kl_weight=0.1, kl_kind=kind)
    assert found["actor/kl_loss"] == pytest.approx(each, abs=1e-6)  # d = 0.2 on every token, before the weight
    assert found["actor/pg_loss"] == pytest.approx(-2 / 3)
    assert learner.losses == pytest.approx([-2 / 3 + 0.1 * each], abs=1e-6)


def test_entropy_bonus_lowers_the_loss():
    learner, _ = learnt(TABLE, entropy_weight=0.01)
    assert learner.losses == pytest.approx([-2 / 3 - 0.01 * (0.5 + 1.0 + 1.5) / 3])


def test_importance_weights_multiply_the_surrogate_only():
    # the engine's log-probs are -0.5: pi_old / mu = 3 is truncated at 2 on the first token, 1 on the others
    old = torch.tensor([0.0, math.log(3) - 0.5, -0.5, 0.0, -0.5])
    learner = TableLearner([math.log(3) - 0.5, -0.5, -0.5], entropy=ENTROPY)
    made = policy(learner, mismatch_mode="truncate", mismatch_cap=2.0, entropy_weight=0.01)
    made.learn(two(), EVERY, old, None, {"advantages": ADVANTAGES}, num_groups=1)
    assert learner.losses == pytest.approx([-(2 * 1 - 1 + 2) / 3 - 0.01])


def test_rows_that_are_not_selected_are_in_no_loss_and_no_denominator():
    learner, _ = learnt(TABLE, selected=torch.tensor([True, False]), aggregation="seq-mean-token-sum")
    assert learner.losses == pytest.approx([0.0])  # (-1 + 1) / 1
    assert learner.rows == [1]
    assert learner.gradients[0].tolist() == pytest.approx([0.0, -1.0, 1.0, 0.0])


def test_loss_does_not_depend_on_the_split_into_micro_batches():
    expected, _ = learnt(ratio_of(1.1), entropy_weight=0.1)
    for budget, layout in ((1, "padded"), (64, "packed"), (3, "packed")):
        learner, _ = learnt(ratio_of(1.1), entropy_weight=0.1, each=passes(token_budget=budget, layout=layout))
        assert learner.losses == pytest.approx(expected.losses)
        torch.testing.assert_close(learner.gradients, expected.gradients)


def test_nothing_selected_takes_no_step():
    learner, found = learnt(TABLE, selected=torch.tensor([False, False]))
    assert learner.calls == []
    assert found == {"actor/updates": 0.0}


def test_first_ratio_is_measured_before_the_first_update_only():
    learner = TableLearner([-1.0] * 4, entropy=[0.0] * 4, shift=0.5)
    made = policy(learner, each=passes(epochs=2, mini_batches=2))
    given = shard([1, 1, 1, 1], [1.0, 0.0, 1.0, 0.0], groups=[0, 0, 1, 1])
    old = torch.tensor([0.0, -1.0] * 4)
    found = global_numbers(
        [made.learn(given, torch.ones(4, dtype=torch.bool), old, None, {"advantages": torch.ones(8)}, num_groups=2)]
    )
    assert learner.rows == [2, 2, 2, 2]
    assert found["actor/updates"] == 4.0
    assert made.version == 4
    assert found["actor/ratio_first_diff"] == 0.0  # though later ratios are not 1
    assert found["actor/ratio_max"] == pytest.approx(math.exp(1.5))  # three shifts of 0.5 before the fourth update


def held(*, shift, token_budget=64, layout="padded", aggregation="token-mean", trust):
    """Two updates on two rows of 2 and 1 tokens, without any advantage; after the first, log-probs move by ``shift``."""
    learner = TableLearner([-1.0] * 3, entropy=[0.0] * 3, shift=shift)
    each = passes(epochs=2, token_budget=token_budget, layout=layout)
    made = policy(learner, each=each, trust=trust, surrogate=reinforce, aggregation=aggregation)
    old = torch.tensor([0.0, -1.0, -1.0, 0.0, -1.0])
    found = made.learn(two(), EVERY, old, None, {"advantages": torch.zeros(5)}, num_groups=1)
    return learner, global_numbers([found])


@pytest.mark.parametrize(
    "split", [{}, {"token_budget": 1}, {"layout": "packed"}, {"aggregation": "seq-mean-token-mean"}]
)
def test_trust_region_prices_what_the_first_update_moved(split):
    learner, found = held(shift=-0.5, trust=TrustRegion(weight=2.0, delta=0.1), **split)
    # before the second update KL(pi_old || pi) is 0.5 per token: 2 * (0.5 - 0.1) = 0.8 times 0.5
    assert learner.losses == pytest.approx([0.0, 0.4])
    assert learner.gradients[0].tolist() == pytest.approx([0.0] * 4)
    assert learner.gradients[1].tolist() == pytest.approx([0.0, *[-0.8 / 3] * 3])  # towards the sampled tokens again
    assert learner.calls == ["update", "logprobs", "update"]  # no pass before the first update
    assert found["actor/trust_region_kl"] == pytest.approx(0.25)  # mean of 0 and 0.5
    assert found["actor/trust_region_factor"] == pytest.approx(0.4)


def test_trust_region_costs_nothing_within_delta_and_is_not_measured_without():
    learner, found = held(shift=-0.05, trust=TrustRegion(weight=2.0, delta=0.1))
    assert learner.losses == pytest.approx([0.0, 0.0])
    assert found["actor/trust_region_kl"] == pytest.approx(0.025)
    assert found["actor/trust_region_factor"] == 0.0
    learner, found = held(shift=-0.5, trust=None)
    assert learner.calls == ["update", "update"]
    assert not [name for name in found if "trust" in name]


def test_trust_region_is_measured_on_the_rows_of_the_step():
    # rows of 1 and 3 tokens, a mini-batch each; when the second mini-batch starts the first has moved log-probs by -0.3
    learner = TableLearner([-1.0] * 4, entropy=[0.0] * 4, shift=-0.3)
    trust = TrustRegion(weight=1.0, delta=0.1)
    made = policy(learner, each=passes(mini_batches=2), trust=trust, surrogate=reinforce)
    given = shard([1, 3], [1.0, 0.0], groups=[0, 1])
    old = torch.tensor([0.0, -1.0, 0.0, -0.7, -0.7, -0.7])
    made.learn(given, EVERY, old, None, {"advantages": torch.zeros(6)}, num_groups=2)
    assert learner.calls == ["update", "logprobs", "update"]
    # short row: KL 0.3, (0.3 - 0.1) * 0.3; long row: KL 0.6, (0.6 - 0.1) * 0.6; both rows together would have 0.525
    long = bool(learner.gradients[1][2] != 0)
    assert learner.losses[1] == pytest.approx(0.3 if long else 0.06)
    moved = [0.0, 0.0, *[-0.5 / 3] * 3] if long else [0.0, -0.2, 0.0, 0.0, 0.0]
    assert learner.gradients[1].tolist() == pytest.approx(moved)


def test_a_surrogate_sees_which_sequence_a_token_belongs_to():
    # log ratios log 2 and 0 in the first response: its ratio is sqrt 2 for both tokens; the second response has 1
    old = TABLE - torch.tensor([0.0, math.log(2), 0.0, 0.0, 0.0])
    for layout in ("padded", "packed"):
        learner, found = learnt(
            old, each=passes(layout=layout), surrogate=partial(gspo, clip_low=0.9, clip_high=0.9),
            aggregation="seq-mean-token-mean",
        )  # fmt: skip
        assert learner.losses == pytest.approx([(0 - 2) / 2])  # advantages 1, -1 cancel; -2 of the second response
        assert found["actor/sequence_ratio"] == pytest.approx((2 * math.sqrt(2) + 1) / 3)
        assert found["actor/ratio"] == pytest.approx(4 / 3)


# -- credit ----------------------------------------------------------------------------------------------------------

THREE = torch.tensor([True, True, True])


def credited(made: Policy, selected=THREE, *, ref=None, streams=None):
    given = shard([2, 3, 1], [1.0, 0.0, 1.0])
    old = torch.tensor([0.0, -1, -1, 0, -1, -1, -1, 0, -1])
    return made.credit(given, selected, old, ref, streams or {}, {}, {})


def test_outcome_advantages_by_hand():
    flat, measured, _ = credited(policy(TableLearner([0.0] * 6)))
    # leave-one-out of [1, 0, 1]: 0.5, -1, 0.5
    assert flat["advantages"].tolist() == pytest.approx([0, 0.5, 0.5, 0, -1, -1, -1, 0, 0.5])
    found = global_numbers([measured])
    assert found["adv/outcome/share"] == pytest.approx(1.0)
    # pi_old = e^-1 and mu = e^-0.5 on every token
    assert found["training/rollout_probs_diff_mean"] == pytest.approx(math.exp(-0.5) - math.exp(-1))
    assert found["training/rollout_kl"] == pytest.approx(0.5)


def test_what_does_not_train_takes_no_part_in_the_baseline():
    flat, _, _ = credited(policy(TableLearner([0.0] * 6)), torch.tensor([True, True, False]))
    assert flat["advantages"].tolist() == pytest.approx([0, 1, 1, 0, -1, -1, -1, 0, 0])


def test_streams_of_sources_are_added_by_their_weights():
    process = {
        "rewards": torch.tensor([math.nan, 0.2, -0.1, math.nan, 0.1, 0.3, -0.2, math.nan, 0.4]),
        "present": torch.tensor([False, True, True, False, True, True, True, False, True]),
    }
    made = policy(TableLearner([0.0] * 6), plans=[plan(), plan("process", RAW, weight=2.0)])
    flat, measured, _ = credited(made, streams={"process": process})
    # returns to go: 0.1 -0.1 | 0.2 0.1 -0.2 | 0.4; twice them beside 0.5, -1, 0.5
    assert flat["advantages"].tolist() == pytest.approx([0, 0.7, 0.3, 0, -0.6, -0.8, -1.4, 0, 1.3])
    shares = {name: value for name, value in global_numbers([measured]).items() if name.endswith("share")}
    assert sum(shares.values()) == pytest.approx(1.0)


def test_kl_stream_is_the_price_of_leaving_the_reference():
    made = policy(TableLearner([0.0] * 6), plans=[plan("kl", RAW, none, weight=0.1)])
    flat, _, _ = credited(made, ref=torch.tensor([0.0, -1.5, -1, 0, -1, -1, -1, 0, -0.5]))
    # -(old - ref): old is -1; ref -1.5 costs 0.5, ref -0.5 pays 0.5
    assert flat["advantages"].tolist() == pytest.approx([0, -0.05, 0, 0, 0, 0, 0, 0, 0.05])


# -- critic ----------------------------------------------------------------------------------------------------------


def test_critic_gives_gae_advantages_and_learns_the_targets():
    # section 23: r = [0, 0, 1], V = [0.5, 0.6, 0.7], gamma 1, lambda 0.95
    values = TableLearner([0.5, 0.6, 0.7])
    critic = Critic(learner=values, plan=CriticPlan(gamma=1.0, lam=0.95), clip=None, passes=passes())
    made = policy(TableLearner([-1.0] * 3, entropy=[0.0] * 3), critic=critic, plans=[plan("outcome", RAW, none)])
    given = shard([3], [1.0])
    old = torch.tensor([0.0, -1, -1, -1])
    chosen = torch.tensor([True])
    flat, _, _ = made.credit(given, chosen, old, None, {}, {}, {})
    assert flat["advantages"].tolist() == pytest.approx([0, 0.46575, 0.385, 0.3])
    assert flat["value_targets"].tolist() == pytest.approx([0, 0.96575, 0.985, 1.0])
    found = global_numbers([made.learn(given, chosen, old, None, flat, num_groups=1)])
    # mean of (V - target)^2 / 2: the advantages again
    assert values.losses == pytest.approx([(0.46575**2 + 0.385**2 + 0.3**2) / 6])
    assert found["critic/vf_loss"] == pytest.approx(values.losses[0])
    assert "actor/pg_loss" in found
