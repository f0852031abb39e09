"""The implicit PRM, its arithmetic and its order of scoring and learning; the model is a table of log-probs."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from rlprm.contract.ranks import on_ranks
from rlprm.core.implicit import implicit_rewards
from rlprm.core.metrics import check_name
from rlprm.core.prm_losses import bco, ce, dpo
from rlprm.engine.combine import global_numbers
from rlprm.engine.policy import Passes
from rlprm.errors import AlignmentError, CheckpointError, ConfigError
from rlprm.parts import made as made_part
from rlprm.sources import implicit
from rlprm.sources.base import OWN
from rlprm.sources.implicit import ImplicitPrm
from tests.unit.made import TableLearner, context, scorable, shard

# Three responses of 2, 3 and 1 tokens. Log-ratios are what the table says, for log pi_ref is 0:
# sums 2, 2 and 8, section 23's example for the cross-entropy.
LOG_RATIOS = [1.5, 0.5, 1.0, 0.5, 0.5, 8.0]
NO_PROMPT = [[False, True, True, False], [False, True, True, True], [False, True, False, False]]
ONE = Passes(epochs=1, mini_batches=1, token_budget=64, layout="padded", seed=0)
SETTINGS = {"beta": 0.05, "reference": "initial", "granularity": "token", "last_token": "keep", "update": "after",
            "loss": ce, "pooling": "sum"}  # fmt: skip
FROZEN = {**SETTINGS, "update": "never", "loss": None, "pooling": None}


def example(**changes):
    return shard([2, 3, 1], [1.0, 0.0, 1.0], **changes)


def given(made, old=None, ref=None):
    zeros = torch.zeros(len(made.tokens))
    return scorable(made, old=zeros if old is None else old, ref=zeros if ref is None else ref)


def prm(learner, *, passes=ONE, reduce=None, **changes):
    where = context(learner=learner, passes=passes)
    return ImplicitPrm(where if reduce is None else replace(where, reduce=reduce), **{**SETTINGS, **changes})


def close(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected))


def test_token_stream_is_beta_times_the_log_ratio():
    scores = prm(TableLearner(LOG_RATIOS)).score(given(example()))
    close(scores.streams[OWN].rewards, [[0, 0.075, 0.025, 0], [0, 0.05, 0.025, 0.025], [0, 0.4, 0, 0]])
    assert scores.streams[OWN].present.tolist() == NO_PROMPT


def test_step_stream_sums_each_step_at_its_last_token():
    steps = example(steps=[[0, 0], [0, 0, 1], [0]])
    stream = prm(TableLearner(LOG_RATIOS), granularity="step").score(given(steps)).streams[OWN]
    # y1: one step of 2.0; y2: steps of 1.5 and 0.5; y3: 8; times 0.05
    close(stream.rewards, [[0, 0, 0.1, 0], [0, 0, 0.075, 0.025], [0, 0.4, 0, 0]])
    assert stream.present.tolist() == [
        [False, False, True, False],
        [False, False, True, True],
        [False, True] + [False] * 2,
    ]


def test_whole_stream_sums_the_response_at_its_last_token():
    stream = prm(TableLearner(LOG_RATIOS), granularity="whole").score(given(example())).streams[OWN]
    close(stream.rewards, [[0, 0, 0.1, 0], [0, 0, 0, 0.1], [0, 0.4, 0, 0]])
    assert stream.present.tolist() == [[False, False, True, False], [False] * 3 + [True], [False, True] + [False] * 2]


def test_a_dropped_last_token_is_paid_nothing_and_learnt_from():
    source = prm(TableLearner(LOG_RATIOS), last_token="drop")
    stream = source.score(given(example())).streams[OWN]
    close(stream.rewards, [[0, 0.075, 0.0, 0], [0, 0.05, 0.025, 0.0], [0, 0.0, 0, 0]])
    assert stream.present.tolist() == NO_PROMPT
    assert global_numbers([source.learn(given(example()))])["prm/loss"] == pytest.approx(0.633936, abs=1e-6)


def test_reference_is_the_initial_model_or_the_policy():
    old, ref = torch.full((9,), 0.5), torch.full((9,), 1.0)
    found = {
        kind: prm(TableLearner(LOG_RATIOS), beta=1.0, reference=kind).score(given(example(), old, ref)).streams[OWN]
        for kind in ("initial", "policy")
    }
    close(found["initial"].rewards, [[0, 0.5, -0.5, 0], [0, 0, -0.5, -0.5], [0, 7.0, 0, 0]])
    close(found["policy"].rewards, [[0, 1.0, 0, 0], [0, 0.5, 0, 0], [0, 7.5, 0, 0]])


@pytest.mark.parametrize("reference", ["initial", "policy"])
def test_no_reference_is_refused(reference):
    # surprisal, which every PRM is shown beside, needs the initial model in any case
    with pytest.raises(AlignmentError, match="needs log-probs of the reference"):
        prm(TableLearner(LOG_RATIOS), reference=reference).score(scorable(example(), ref=None))


@pytest.mark.parametrize(
    ("train", "outcomes", "loss"),
    [
        # sigma(0.05 * 2) = 0.524979, sigma(0.05 * 8) = 0.598688
        ([True, False, False], [1.0, 0.0, 1.0], 0.644397),
        ([False, True, False], [1.0, 0.0, 1.0], 0.744397),
        ([False, False, True], [1.0, 0.0, 1.0], 0.513015),
        ([True, True, True], [1.0, 0.0, 1.0], 0.633936),
        # y2 was not judged: it is in neither the sum nor the denominator; (0.644397 + 0.513015) / 2
        ([True, True, True], [1.0, None, 1.0], 0.578706),
    ],
)
def test_loss_is_over_accepted_rows_with_an_outcome(train, outcomes, loss):
    learner = TableLearner(LOG_RATIOS)
    learned = prm(learner).learn(given(shard([2, 3, 1], outcomes, train=train)))
    known = [each and outcome is not None for each, outcome in zip(train, outcomes, strict=True)]
    assert learner.rows == [sum(known)]
    assert global_numbers([learned])["prm/loss"] == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("loss", [ce, dpo])
def test_gradient_does_not_depend_on_the_split_into_micro_batches(loss):
    splits = [(64, "padded"), (1, "padded"), (64, "packed"), (5, "packed")]
    learners = [TableLearner(LOG_RATIOS) for _ in splits]
    for learner, (budget, layout) in zip(learners, splits, strict=True):
        passes = replace(ONE, token_budget=budget, layout=layout)
        learned = prm(learner, passes=passes, loss=loss).learn(given(example()))
        assert global_numbers([learned])["prm/loss"] == pytest.approx({ce: 0.633936, dpo: 0.623751}[loss], abs=1e-6)
        torch.testing.assert_close(learner.gradients[0], learners[0].gradients[0])
    # d loss / d log-ratio_t = beta * dL/dr, the same for all tokens of a response (dL/dr: tests of core.prm_losses)
    slopes = {
        ce: [(0.524979 - 1) / 3, 0.524979 / 3, (0.598688 - 1) / 3],
        dpo: [-0.25, 0.462779, -0.212779],
    }[loss]
    expected = [0.0] + [0.05 * slopes[0]] * 2 + [0.05 * slopes[1]] * 3 + [0.05 * slopes[2]]
    assert learners[0].gradients[0].tolist() == pytest.approx(expected, abs=1e-7)


def test_mean_over_steps_divides_the_reward_and_its_gradient():
    # y2 has two steps: r = 0.1 / 2; pairs: 0.1 - 0.05 and 0.4 - 0.05
    made = example(steps=[[0, 0], [0, 0, 1], [0]])
    learner = TableLearner(LOG_RATIOS)
    learned = prm(learner, loss=dpo, pooling="step_mean").learn(given(made))
    gaps = torch.tensor([0.05, 0.35])
    assert global_numbers([learned])["prm/loss"] == pytest.approx(
        float(-torch.nn.functional.logsigmoid(gaps).mean()), abs=1e-6
    )
    pull = torch.sigmoid(-gaps) / 2
    expected = [0.0, *[-0.05 * float(pull[0])] * 2, *[0.05 / 2 * float(pull.sum())] * 3, -0.05 * float(pull[1])]
    assert learner.gradients[0].tolist() == pytest.approx(expected, abs=1e-7)


def test_metrics_are_in_nats_of_the_log_ratio():
    found = global_numbers([prm(TableLearner(LOG_RATIOS)).learn(given(example()))])
    assert found["prm/log_ratio_abs"] == pytest.approx((2 + 2 + 8) / 3)
    assert found["prm/kl_to_ref"] == pytest.approx(12 / 6)
    assert found["prm/label_mean"] == pytest.approx(2 / 3)
    assert found["prm/updates"] == 1.0


def test_every_metric_is_in_the_table():
    found = {}
    for loss in (dpo, partial(bco, decay=0.9)):
        found |= global_numbers([prm(TableLearner(LOG_RATIOS), loss=loss).learn(given(example()))])
    assert {"prm/loss", "prm/pairs", "prm/shift"} <= set(found)
    for name in found:
        check_name(name)


def test_after_scores_before_any_update():
    learner = TableLearner(LOG_RATIOS, shift=1.0)
    source = prm(learner, beta=1.0)
    scores = source.score(given(example()))
    assert learner.calls == ["logprobs"]
    close(scores.streams[OWN].rewards, [[0, 1.5, 0.5, 0], [0, 1, 0.5, 0.5], [0, 8.0, 0, 0]])
    assert scores.measurement.rows.reward.tolist() == pytest.approx([2.0, 2.0, 8.0])
    source.learn(given(example()))
    assert learner.calls == ["logprobs", "update"]  # the log-probs of scoring are those of the first optimizer step


def test_before_measures_then_learns_then_scores_again():
    learner = TableLearner(LOG_RATIOS, shift=1.0)
    source = prm(learner, beta=1.0, update="before")
    scores = source.score(given(example()))
    assert learner.calls == ["logprobs", "update", "logprobs"]
    assert scores.measurement.rows.reward.tolist() == pytest.approx([2.0, 2.0, 8.0])  # of responses never seen before
    close(scores.streams[OWN].rewards, [[0, 2.5, 1.5, 0], [0, 2, 1.5, 1.5], [0, 9.0, 0, 0]])  # of the updated PRM
    learned = source.learn(given(example()))
    assert learner.calls == ["logprobs", "update", "logprobs"]  # not a second time
    assert global_numbers([learned])["prm/updates"] == 1.0


def test_later_optimizer_steps_see_the_prm_as_it_is_then():
    # two prompts, one a step: the second is learnt from after the table has moved by 1 a token
    made = shard([1, 1, 1, 1], [1.0, 0.0, 1.0, 0.0], groups=[0, 0, 1, 1])
    learner = TableLearner([0.0] * 4, shift=1.0)
    source = prm(learner, beta=1.0, passes=replace(ONE, mini_batches=2))
    source.score(given(made))
    found = global_numbers([source.learn(given(made))])
    assert learner.calls == ["logprobs", "update", "logprobs", "update"]
    # log 2 twice at r = 0; then at r = 1: -log sigma(1) = 0.313262 and -log sigma(-1) = 1.313262; mean of both steps
    assert found["prm/loss"] == pytest.approx((0.693147 + (0.313262 + 1.313262) / 2) / 2, abs=1e-6)


def test_log_probs_of_another_batch_are_not_taken_for_this_one():
    learner = TableLearner(LOG_RATIOS)
    source = prm(learner)
    source.score(given(shard([1, 1], [1.0, 0.0])))
    found = global_numbers([source.learn(given(example()))])
    assert learner.calls == ["logprobs", "logprobs", "update"]
    assert found["prm/loss"] == pytest.approx(0.633936, abs=1e-6)


def test_every_epoch_sees_every_row_once():
    learner = TableLearner([0.1] * 6)
    passes = replace(ONE, epochs=2, mini_batches=3)
    made = shard([1] * 6, [1.0, 0.0] * 3, groups=[0, 0, 1, 1, 2, 2])
    found = global_numbers([prm(learner, passes=passes).learn(given(made))])
    assert learner.rows == [2] * 6
    assert found["prm/updates"] == 6.0


def test_nothing_to_learn_from_takes_no_step():
    learner = TableLearner(LOG_RATIOS)
    learned = prm(learner).learn(given(shard([2, 3, 1], [None, None, None])))
    assert "update" not in learner.calls
    assert global_numbers([learned]) == {"prm/updates": 0.0}


def test_a_pair_loss_skips_what_has_no_pair_and_counts_what_has():
    # group 0 has one pair, group 1 none
    made = shard([1, 1, 1, 1], [1.0, 0.0, 1.0, 1.0], groups=[0, 0, 1, 1])
    learner = TableLearner([0.0] * 4)
    found = global_numbers([prm(learner, loss=dpo, passes=replace(ONE, mini_batches=2)).learn(given(made))])
    assert found["prm/pairs"] == 1.0
    assert found["prm/updates"] == 1.0
    assert learner.calls.count("update") == 1
    none = global_numbers([prm(TableLearner([0.0] * 2), loss=dpo).learn(given(shard([1, 1], [1.0, 1.0])))])
    assert none == {"prm/pairs": 0.0, "prm/updates": 0.0}


def test_ranks_share_one_loss_and_step_together():
    # rank 1 has no pair of its own; its share is 0 and it still updates
    halves = [shard([2, 3], [1.0, 0.0], groups=[0, 0]), shard([1], [1.0], groups=[1])]

    def work(made, reduce):
        learner = TableLearner(LOG_RATIOS)
        learned = prm(learner, loss=dpo, reduce=reduce).learn(given(made))
        return learner.calls.count("update"), learned

    found = on_ranks(work, halves)
    assert [updates for updates, _ in found] == [1, 1]
    merged = global_numbers([learned for _, learned in found])
    assert merged["prm/pairs"] == 1.0
    assert merged["prm/loss"] == pytest.approx(0.693147, abs=1e-6)


def test_bco_goes_on_from_its_checkpoint(tmp_path):
    class Saving(TableLearner):
        def save(self, folder):
            folder = tmp_path / "process"
            folder.mkdir(exist_ok=True)

        def load(self, folder):
            pass

    def step(source):
        return global_numbers([source.learn(given(example()))])["prm/shift"]

    loss = partial(bco, decay=0.5)
    source = prm(Saving(LOG_RATIOS, shift=1.0), beta=1.0, loss=loss)
    assert step(source) == pytest.approx((5 + 2) / 2)  # class means (2 + 8) / 2 and 2
    source.save(str(tmp_path / "process"))
    assert json.loads((tmp_path / "process/loss.json").read_text()) == {"right": 5.0, "wrong": 2.0}
    resumed = prm(Saving([each + 1 for each in LOG_RATIOS]), beta=1.0, loss=loss)
    resumed.load(str(tmp_path / "process"))
    # the table has moved by 1 a token: class means 5 + 1.5 and 2 + 3, half old and half new
    assert step(resumed) == step(source) == pytest.approx((5.75 + 3.5) / 2)
    (tmp_path / "process/loss.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"loss\.json cannot be read"):
        resumed.load(str(tmp_path / "process"))


def test_a_frozen_prm_scores_and_nothing_else(monkeypatch, tmp_path):
    table = TableLearner(LOG_RATIOS)
    monkeypatch.setattr(implicit, "_frozen", lambda where: table)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    source = ImplicitPrm(context(model=str(tmp_path / "model")), **FROZEN)
    scores = source.score(given(example()))
    close(scores.streams[OWN].rewards[2], [0, 0.4, 0, 0])
    assert scores.measurement is not None
    assert global_numbers([source.learn(given(example()))]) == {}
    assert table.calls == ["logprobs"]
    source.save(str(tmp_path / "saved"))
    source.load(str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()
    assert source.export(str(tmp_path / "out")) == str(tmp_path / "out")
    assert (tmp_path / "out/config.json").read_text() == "{}"
    source.close()


@pytest.mark.parametrize(
    ("model", "learner", "changes", "message"),
    [
        (None, True, {}, "has no model"),
        ("m", False, {}, "learner is null"),
        ("m", True, FROZEN, "update is never and there is a learner"),
        ("m", False, {**FROZEN, "loss": ce}, "loss is set and kind.update is never"),
        ("m", False, {**FROZEN, "pooling": "sum"}, "pooling is set and kind.update is never"),
        ("m", True, {"loss": None}, "needs both"),
        ("m", True, {"pooling": None}, "needs both"),
        ("m", True, {"beta": 0.0}, "pays nothing"),
        ("m", True, {"beta": -1.0}, "pays for being wrong"),
        ("m", True, {"last_token": "drop", "granularity": "step"}, "whose reward sits on that token"),
        (
            "m",
            True,
            {"loss": {"_target_": "rlprm.core.prm_losses.bco", "_partial_": True, "decay": 2.0}},
            "decay is 2.0",
        ),
    ],
)
def test_impossible_settings_are_refused_at_start_up(model, learner, changes, message):
    with pytest.raises(ConfigError, match=message):
        ImplicitPrm.check(model=model, learner=learner, **{**SETTINGS, **changes})


def test_possible_settings_pass():
    ImplicitPrm.check(model="m", learner=True, **SETTINGS)
    ImplicitPrm.check(model="m", learner=False, **FROZEN)
    assert ImplicitPrm.granularity(**{**SETTINGS, "granularity": "step"}) == "step"


def istar(learner):
    """The source that the method names, with its settings as they are composed."""
    from tests.contract.options import values

    kind = values("train", ["method=istar_as_written", "model.path=m"])["streams"]["process"]["source"]["kind"]
    assert (kind["reference"], kind["granularity"], kind["pooling"]) == ("policy", "step", "sum")
    return made_part(kind)(context(learner=learner, passes=ONE))


def test_istar_as_written_trains_its_prm():
    learner = TableLearner(LOG_RATIOS)
    source = istar(learner)
    source.score(given(example()))
    found = global_numbers([source.learn(given(example()))])
    assert found["prm/loss"] == pytest.approx(0.623751, abs=1e-6)  # beta 0.05
    assert float(learner.gradients[0].norm()) > 0.01
    assert (learner.gradients[0][1:3] < 0).all()  # the tokens of right responses become likelier
    assert (learner.gradients[0][3:6] > 0).all()
    moved = TableLearner((learner.table - 100 * learner.gradients[0])[1:].tolist())
    after = global_numbers([istar(moved).learn(given(example()))])
    assert after["prm/loss"] < found["prm/loss"]


def test_a_prm_whose_rewards_are_detached_would_be_noticed(monkeypatch):
    # the fault of the released code: the loss is right, and nothing reaches the weights
    monkeypatch.setattr(implicit, "implicit_rewards", lambda *given: implicit_rewards(*given).detach())
    learner = TableLearner(LOG_RATIOS)
    found = global_numbers([istar(learner).learn(given(example()))])
    assert found["prm/loss"] == pytest.approx(0.623751, abs=1e-6)
    assert float(learner.gradients[0].norm()) == 0
