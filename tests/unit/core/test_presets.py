"""Shipped YAMLs put together as their methods use them, against numbers worked out by hand, through the one `credit`."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import yaml

from rlprm.core.credit import StreamPlan, credit, outcome_stream
from rlprm.core.gates import open_gate
from rlprm.core.reduce import Identity
from rlprm.parts import made
from rlprm.paths import conf_dir
from rlprm.records import Stream
from tests.unit.core.worked import close, example, off_response, on_response, process_stream, shard_of


def piece(group, option, **settings):
    """What the YAML makes, with some settings changed."""
    made_of = yaml.safe_load((conf_dir() / group / f"{option}.yaml").read_text(encoding="utf-8"))
    assert set(settings) <= set(made_of)
    return made({**made_of, **settings})


def plan(name, normalizer="raw", estimator="to_go", weight=1.0, merge=None):
    return StreamPlan(
        name=name,
        merge=merge or piece("merge", "separate"),
        normalizer=piece("normalizer", normalizer),
        estimator=piece("estimator", estimator) if isinstance(estimator, str) else estimator,
        weight=weight,
        gate=open_gate,
    )


def total(shard, streams, *plans, whiten="none"):
    found = credit(shard, streams, plans, Identity(), whiten=whiten, trust={})
    return off_response(found.advantages.total, shard)


def process(shard):
    return {"process": process_stream(shard)}


def test_grpo_with_process_supervision_is_the_step_zscore_to_go():
    # all six step rewards: mean 0.116667, std_b 0.231661; summed from each token on
    shard = example()
    expected = [[-0.575552, -0.935272], [-0.647496, -0.575552, -1.366936], [1.223048]]
    close(total(shard, process(shard), plan("process", "step_zscore")), expected, 1e-5)


def test_step_grpo_is_the_step_zscore_on_its_own_step():
    shard = example()
    expected = [[0.359720, -0.935272], [-0.071944, 0.791384, -1.366936], [1.223048]]
    close(total(shard, process(shard), plan("process", "step_zscore", "step_local")), expected, 1e-5)


def test_spro_masked_step_advantage():
    shard = example()
    expected = [[-0.033333, -0.15], [-0.133333, 0.15, 0.0], [0.166667]]
    close(total(shard, process(shard), plan("process", "spro", "none")), expected)


def test_pure_without_a_baseline():
    shard = shard_of([3], [1.0])
    stream = Stream(rewards=on_response(shard, [[0.9, -0.2, 0.6]]), present=shard.response_mask)
    softmin = piece("estimator", "pure_softmin", baseline="none", zero_ends=False)
    found = total(shard, {"process": stream}, plan("process", estimator=softmin))
    close(found, [[-0.199713, -0.199728, 2.01e-4]], 1e-6)


def test_verl_recipe_before_and_after_whitening():
    shard = example()
    streams = {"outcome": outcome_stream(shard), "process": process_stream(shard)}
    plans = (
        plan("outcome", "leave_one_out", weight=5.0),
        plan("process", "prime_as_released", weight=5.0, merge=piece("merge", "zero_last")),
    )
    # the last tokens' 0 counts in m = 0.25, 0.333333, 0 (scale 0.4): B = 0.291666
    expected = [[3.333331, 1.041670], [-1.875008, -2.291673, -6.458330], [1.041670]]
    close(total(shard, streams, *plans), expected, 2e-5)
    expected = [[1.220616, 0.554827], [-0.292546, -0.413599, -1.624125], [0.554827]]
    close(total(shard, streams, *plans, whiten="full"), expected)


def test_papo_adds_two_scores_of_their_own():
    # outcome z-score 0.577349, -1.154699, 0.577349; process 0.707103, 0, -0.707103
    shard = shard_of([1, 1, 1], [1.0, 0.0, 1.0])
    judged = Stream(rewards=on_response(shard, [[0.8], [0.9], [0.5]]), present=shard.response_mask)
    streams = {"outcome": outcome_stream(shard), "process": judged}
    found = total(shard, streams, plan("outcome", "group_zscore"), plan("process", "papo_correct_zscore"))
    close(found, [[1.284452], [-1.154699], [-0.129754]], 3e-6)


def test_renorm_never_lets_a_step_contradict_the_outcome():
    # wrong: -0.8, -0.1 and 0 for the outcome; right: 0.2, 0.9 and 1; paid where they are
    shard = shard_of([3, 3], [0.0, 1.0])
    judged = Stream(rewards=on_response(shard, [[0.2, 0.9, 0.7]] * 2), present=shard.response_mask)
    streams = {"outcome": outcome_stream(shard), "process": judged}
    found = total(
        shard,
        streams,
        plan("outcome", estimator="none"),
        plan("process", estimator="none", merge=piece("merge", "renorm")),
    )
    close(found, [[-0.8, -0.1, 0.0], [0.2, 0.9, 1.0]])


def test_normalizing_after_the_sum_lets_the_wider_stream_win():
    # outcome + 10 * sum of process = 2, 2, 5: mean 3, std_b sqrt(3); apart, the outcome alone decides y2 and y3
    shard = example()
    streams = {"outcome": outcome_stream(shard), "process": process_stream(shard)}
    merged = total(shard, streams, plan("outcome", "group_zscore", merge=piece("merge", "sum_into", weight=10.0)))
    assert [row[0] for row in merged] == pytest.approx([-0.577350, -0.577350, 1.154700], abs=2e-6)


def test_reasonflux_blend():
    # two one-token steps 0.2 and 0.6, alpha 1: 0.4 + 0.6 = 1.0; share 0.75 beside outcome 1: 1.0; beside 0: 0.75
    shard = shard_of([2, 2], [1.0, 0.0])
    scores = Stream(rewards=on_response(shard, [[0.2, 0.6]] * 2), present=shard.response_mask)
    streams = {"outcome": outcome_stream(shard), "process": scores}
    found = total(shard, streams, plan("outcome", merge=piece("merge", "blend")))
    close(found, [[1.0, 1.0], [0.75, 0.75]])


def test_kl_to_go_after_normalization_reads_at_step_starts():
    # PRL: z-scored outcome 0.707106, -0.707106 minus 1/2 of the log-ratios from the step's first token on
    shard = shard_of([3, 1], [1.0, 0.0], steps=[[0, 0, 1], [0]])
    ratios = Stream(rewards=on_response(shard, [[0.2, 0.4, -0.6], [1.0]]), present=shard.response_mask)
    streams = {"outcome": outcome_stream(shard), "process": ratios}
    found = total(
        shard, streams, plan("outcome", "group_zscore"), plan("process", estimator="to_go_from_step", weight=-0.5)
    )
    close(found, [[0.707106, 0.707106, 1.007106], [-1.207106]], 3e-6)


def test_prm_as_value():
    # PRIME's variant: leave-one-out outcome 0.5, -1, 0.5 minus the prefix sum before each token
    shard = example()
    streams = {"outcome": outcome_stream(shard), "process": process_stream(shard)}
    found = total(shard, streams, plan("outcome", "leave_one_out"), plan("process", estimator="as_value"))
    close(found, [[0.5, 0.3], [-1.0, -1.1, -1.4], [0.5]])


def test_progrs_on_aggregated_scores():
    # mean steps 0.05, 0.066667, 0.4 at the last token, from the wrong one's: -0.016667, 0, 0.333333 on every token
    shard = example()
    found = total(shard, process(shard), plan("process", "progrs", merge=piece("merge", "aggregate")))
    close(found, [[-0.016667] * 2, [0.0] * 3, [0.333333]])


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("opo", [0.5, -0.5, 0.5]),  # (2 + 1) / 6
        ("batch_zscore", [0.577349, -1.154699, 0.577349]),  # one group is the batch
        ("group_mean", [0.333333, -0.666667, 0.333333]),
    ],
)
def test_outcome_schemes(option, expected):
    shard = example()
    found = total(shard, {"outcome": outcome_stream(shard)}, plan("outcome", option))
    assert [row[0] for row in found] == pytest.approx(expected, abs=2e-6)


def test_running_zscore_moves_with_the_batches():
    # decay 0.9. Outcomes 1, 0, 1: mean 2/3, std_b 0.577350. Then 1, 1, 1: old weight 2.7, m2 0.9 * 0.666667 = 0.6;
    # weight 5.7, mean 2/3 + 1/3 * 3/5.7 = 0.842105, m2 0.6 + 1/9 * 2.7 * 3/5.7 = 0.757895, std 0.401565
    first = example()
    plans = [plan("outcome", "running_zscore")]
    run = partial(credit, plans=plans, reduce=Identity(), whiten="none", trust={})
    found = run(first, {"outcome": outcome_stream(first)})
    starts = found.advantages.total[:, 1].tolist()
    assert starts == pytest.approx([0.577349, -1.154699, 0.577349], abs=2e-6)
    second = shard_of([2, 3, 1], [1.0, 1.0, 1.0])
    later = run(second, {"outcome": outcome_stream(second)}, moments=found.moments)
    assert later.advantages.total[:, 1].tolist() == pytest.approx([0.393198] * 3, abs=2e-6)
    assert torch.all(
        run(second, {"outcome": outcome_stream(second)}).advantages.total == 0
    )  # nothing before: no spread
