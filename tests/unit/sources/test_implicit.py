"""The online implicit PRM, its arithmetic and its order of scoring and learning; the model is a table of log-probs."""

from __future__ import annotations

import pytest
import torch

from rlprm.core.reduce import Identity
from rlprm.engine.combine import global_numbers
from rlprm.engine.policy import Passes
from rlprm.errors import AlignmentError
from rlprm.sources.implicit import implicit_prm
from tests.unit.made import TableLearner, shard

# Three responses of 2, 3 and 1 tokens. Log-ratios are what the table says, for log pi_ref is 0:
# sums 2, 2 and 8, section 23's example for the cross-entropy.
LOG_RATIOS = [1.5, 0.5, 1.0, 0.5, 0.5, 8.0]
NO_PROMPT = [False, True, True, False, True, True, True, False, True]


def example(**changes):
    return shard([2, 3, 1], [1.0, 0.0, 1.0], **changes)


def prm(learner, *, beta=0.05, reference="initial", granularity="token", update="after", passes=None):
    return implicit_prm(
        learner,
        "process",
        passes or Passes(epochs=1, mini_batches=1, token_budget=64, layout="padded", seed=0),
        1.0,
        Identity(),
        None,
        beta=beta,
        reference=reference,
        granularity=granularity,
        update=update,
    )


ZEROS = torch.zeros(9)


def test_token_stream_is_beta_times_the_log_ratio():
    stream, _ = prm(TableLearner(LOG_RATIOS)).score(example(), ZEROS, ZEROS)
    expected = [0.0, 0.075, 0.025, 0.0, 0.05, 0.025, 0.025, 0.0, 0.4]
    assert stream["rewards"].tolist() == pytest.approx(expected)
    assert stream["present"].tolist() == NO_PROMPT


def test_step_stream_sums_each_step_at_its_last_token():
    made = example(steps=[[0, 0], [0, 0, 1], [0]])
    stream, _ = prm(TableLearner(LOG_RATIOS), granularity="step").score(made, ZEROS, ZEROS)
    # y1: one step of 2.0; y2: steps of 1.5 and 0.5; y3: 8; times 0.05
    assert stream["rewards"].tolist() == pytest.approx([0, 0, 0.1, 0, 0, 0.075, 0.025, 0, 0.4])
    assert stream["present"].tolist() == [False, False, True, False, False, True, True, False, True]


def test_whole_stream_sums_the_response_at_its_last_token():
    stream, _ = prm(TableLearner(LOG_RATIOS), granularity="whole").score(example(), ZEROS, ZEROS)
    assert stream["rewards"].tolist() == pytest.approx([0, 0, 0.1, 0, 0, 0, 0.1, 0, 0.4])
    assert stream["present"].tolist() == [False, False, True, False, False, False, True, False, True]


def test_reference_is_the_initial_model_or_the_policy():
    old, ref = torch.full((9,), 0.5), torch.full((9,), 1.0)
    from_initial, _ = prm(TableLearner(LOG_RATIOS), beta=1.0).score(example(), old, ref)
    from_policy, _ = prm(TableLearner(LOG_RATIOS), beta=1.0, reference="policy").score(example(), old, ref)
    assert from_initial["rewards"].tolist() == pytest.approx([0, 0.5, -0.5, 0, 0, -0.5, -0.5, 0, 7.0])
    assert from_policy["rewards"].tolist() == pytest.approx([0, 1.0, 0, 0, 0.5, 0, 0, 0, 7.5])


@pytest.mark.parametrize("reference", ["initial", "policy"])
def test_no_reference_is_refused(reference):
    # surprisal, which every PRM is shown beside, needs the initial model in any case
    with pytest.raises(AlignmentError, match="needs log-probs of the reference"):
        prm(TableLearner(LOG_RATIOS), reference=reference).score(example(), ZEROS, None)


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
def test_cross_entropy_on_accepted_rows_with_an_outcome(train, outcomes, loss):
    learner = TableLearner(LOG_RATIOS)
    learned = prm(learner).learn(shard([2, 3, 1], outcomes, train=train), ZEROS, ZEROS)
    assert learner.losses == pytest.approx([loss], abs=1e-6)
    known = [each and outcome is not None for each, outcome in zip(train, outcomes, strict=True)]
    assert learner.rows == [sum(known)]
    assert global_numbers([learned])["prm/loss"] == pytest.approx(loss, abs=1e-6)


def test_loss_does_not_depend_on_the_split_into_micro_batches():
    passes = [Passes(epochs=1, mini_batches=1, token_budget=budget, layout=layout, seed=0) for budget, layout in
              [(64, "padded"), (1, "padded"), (64, "packed"), (5, "packed")]]  # fmt: skip
    learners = [TableLearner(LOG_RATIOS) for _ in passes]
    for learner, each in zip(learners, passes, strict=True):
        prm(learner, passes=each).learn(example(), ZEROS, ZEROS)
        assert learner.losses == pytest.approx([0.633936], abs=1e-6)
        torch.testing.assert_close(learner.gradients[0], learners[0].gradients[0])
    # d loss / d log-ratio_t = beta (sigma(r) - outcome) / 3, the same for all tokens of a response
    assert learners[0].gradients[0].tolist() == pytest.approx(
        [0.0] + [0.05 * (0.524979 - 1) / 3] * 2 + [0.05 * 0.524979 / 3] * 3 + [0.05 * (0.598688 - 1) / 3], abs=1e-7
    )


def test_metrics_are_in_nats_of_the_log_ratio():
    found = global_numbers([prm(TableLearner(LOG_RATIOS)).learn(example(), ZEROS, ZEROS)])
    assert found["prm/log_ratio_abs"] == pytest.approx((2 + 2 + 8) / 3)
    assert found["prm/kl_to_ref"] == pytest.approx(12 / 6)
    assert found["prm/label_mean"] == pytest.approx(2 / 3)
    assert found["prm/updates"] == 1.0


def test_after_scores_before_any_update():
    learner = TableLearner(LOG_RATIOS, shift=1.0)
    source = prm(learner, beta=1.0)
    stream, measured = source.score(example(), ZEROS, ZEROS)
    assert learner.calls == ["logprobs"]
    assert stream["rewards"].tolist() == pytest.approx([0, 1.5, 0.5, 0, 1, 0.5, 0.5, 0, 8])
    assert measured.rows.reward.tolist() == pytest.approx([2.0, 2.0, 8.0])
    source.learn(example(), ZEROS, ZEROS)
    assert learner.calls == ["logprobs", "update"]


def test_before_measures_then_learns_then_scores_again():
    learner = TableLearner(LOG_RATIOS, shift=1.0)
    source = prm(learner, beta=1.0, update="before")
    stream, measured = source.score(example(), ZEROS, ZEROS)
    assert learner.calls == ["logprobs", "update", "logprobs"]
    assert measured.rows.reward.tolist() == pytest.approx([2.0, 2.0, 8.0])  # of responses never seen before
    assert stream["rewards"].tolist() == pytest.approx([0, 2.5, 1.5, 0, 2, 1.5, 1.5, 0, 9])  # of the updated PRM
    learned = source.learn(example(), ZEROS, ZEROS)
    assert learner.calls == ["logprobs", "update", "logprobs"]  # not a second time
    assert global_numbers([learned])["prm/updates"] == 1.0


def test_never_never_learns():
    learner = TableLearner(LOG_RATIOS)
    source = prm(learner, update="never")
    source.score(example(), ZEROS, ZEROS)
    source.learn(example(), ZEROS, ZEROS)
    assert learner.calls == ["logprobs"]


def test_every_epoch_sees_every_row_once():
    learner = TableLearner([0.1] * 6)
    passes = Passes(epochs=2, mini_batches=3, token_budget=64, layout="padded", seed=0)
    made = shard([1] * 6, [1.0, 0.0] * 3, groups=[0, 0, 1, 1, 2, 2])
    found = global_numbers([prm(learner, passes=passes).learn(made, torch.zeros(12), torch.zeros(12))])
    assert learner.rows == [2] * 6
    assert found["prm/updates"] == 6.0


def test_nothing_to_learn_from_takes_no_step():
    learner = TableLearner(LOG_RATIOS)
    learned = prm(learner).learn(shard([2, 3, 1], [None, None, None]), ZEROS, ZEROS)
    assert learner.calls == []
    assert global_numbers([learned]) == {"prm/updates": 0.0}
