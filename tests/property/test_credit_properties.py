"""What must hold for every normalizer, estimator, gate and whitening, whatever the shard."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlprm.contract.ranks import on_ranks
from rlprm.core.credit import CriticPlan, StreamPlan, credit, outcome_stream
from rlprm.core.estimators import none, step_local, to_go
from rlprm.core.gates import open_gate, sign_consistent, trust_gate
from rlprm.core.merge import posterior_gate, separate
from rlprm.core.normalize import RAW, normalize
from rlprm.core.reduce import Identity
from rlprm.records import Shard, Stream
from tests.unit.core.worked import NO_AXES

few = settings(max_examples=15, deadline=None, derandomize=True)


def axes(**changed):
    return partial(normalize, **{**NO_AXES, **changed})


CENTRE_SCALE = {"order": "centre_then_scale", "eps": 1e-6}
SCALE_CENTRE = {"order": "scale_then_centre", "eps": 1e-6}
RLOO = axes(unit="response", centre="leave_one_out")
GRPO = axes(unit="response", centre="group", scale="group_std", **CENTRE_SCALE)
NORMALIZERS = {
    "raw": RAW,
    "grpo": GRPO,
    "group_mean": axes(unit="response", centre="group"),
    "rloo": RLOO,
    "prime_as_written": axes(centre="token_mean_loo", scale="return_range", **SCALE_CENTRE),
    "prime_as_released": axes(centre="token_mean_loo_released", scale="local_return_range", **SCALE_CENTRE),
    "return_range": axes(scale="return_range", eps=1e-6),
    "step_zscore": axes(unit="step", centre="group", scale="group_std", **CENTRE_SCALE),
    "step_index": axes(unit="step", centre="step_index"),
    "token_pooled_loo": axes(centre="leave_one_out", bound=0.5),
    "group_mean_batch_std": axes(unit="response", centre="group", scale="batch_std", **CENTRE_SCALE),
    "batch_zscore": axes(centre="batch", scale="batch_std", bound="tanh", **CENTRE_SCALE),
}


def plans(normalizer, *, weight=0.5, estimator=None, gate=open_gate, merge=separate):
    outcome = StreamPlan(
        name="outcome", merge=separate, normalizer=GRPO, estimator=partial(to_go, gamma=1.0), weight=1.0, gate=open_gate
    )
    process = StreamPlan(
        name="process",
        merge=merge,
        normalizer=normalizer,
        estimator=estimator or partial(to_go, gamma=0.9),
        weight=weight,
        gate=gate,
    )
    return [outcome, process]


@dataclass(frozen=True)
class Case:
    shard: Shard
    process: Stream

    def rows(self, index: Tensor) -> Case:
        process = Stream(rewards=self.process.rewards[index], present=self.process.present[index])
        return Case(shard=self.shard.select(index), process=process)

    def padded(self, width: int) -> Case:
        """The same rows with ``width`` more columns of padding (fewer when negative)."""

        def longer(value: Tensor) -> Tensor:
            fill = -1 if value.dtype == torch.int64 else 0
            return torch.nn.functional.pad(value, (0, width), value=fill) if value.dim() == 2 else value

        shard = Shard(**{field.name: longer(getattr(self.shard, field.name)) for field in fields(self.shard)})
        return Case(
            shard=shard, process=Stream(rewards=longer(self.process.rewards), present=longer(self.process.present))
        )


@st.composite
def cases(draw):
    """Random groups, some of one member, in random row order; NaN wherever nothing may be read."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    order = torch.randperm(sum(sizes), generator=generator)
    group = torch.cat([torch.full((size,), 10 * i + 3) for i, size in enumerate(sizes)])[order]
    count = len(group)
    prompts, lengths = integers(1, 3, count), integers(1, 6, count)
    position = torch.arange(int((prompts + lengths).max()))[None, :]
    attention = position < (prompts + lengths)[:, None]
    response = attention & (position >= prompts[:, None])
    step_index = (response & (integers(0, 2, *response.shape) == 1)).long()
    first = response & (position == prompts[:, None])
    step_index = torch.where(response, (step_index * ~first).cumsum(1), -1)
    # A coarse grid: ties and groups without spread are common, and rounding cannot decide a comparison.
    rewards = integers(-4, 5, *response.shape) / 4.0
    present = response & (integers(0, 4, *response.shape) > 0)
    judged = integers(0, 5, count) > 0
    shard = Shard(
        tokens=integers(0, 9, *response.shape) * attention,
        attention_mask=attention,
        response_mask=response,
        rollout_logprobs=torch.zeros(response.shape),
        step_index=step_index,
        step_label=torch.full(response.shape, -1),
        outcome=torch.where(judged, integers(0, 2, count).float(), torch.nan),
        outcome_present=judged,
        greedy_outcome=torch.zeros(count),
        greedy_present=torch.zeros(count, dtype=torch.bool),
        group=group,
        version=torch.zeros(count, dtype=torch.int64),
        truncated=torch.zeros(count, dtype=torch.bool),
        fresh=torch.ones(count, dtype=torch.bool),
        train=(group % 7 != 3) | (group == group[0]),
        row=torch.arange(count),
    )
    return Case(shard=shard, process=Stream(rewards=torch.where(present, rewards, torch.nan), present=present))


def run(case, plans, whiten="full", reduce=None, **critic):
    streams = {"outcome": outcome_stream(case.shard), "process": case.process}
    return credit(case.shard, streams, plans, reduce or Identity(), whiten=whiten, trust={"process": 0.3}, **critic)


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


VARIANTS = [
    *({"normalizer": normalizer} for normalizer in NORMALIZERS.values()),
    {"normalizer": RAW, "estimator": none, "gate": sign_consistent},
    {"normalizer": RAW, "estimator": step_local, "gate": trust_gate},
    {"normalizer": RAW, "merge": partial(posterior_gate, stream="process")},
]
NAMES = [*NORMALIZERS, "sign_gate", "step_local_trust", "posterior"]
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=NAMES)


@every_variant
@few
@given(case=cases(), whiten=st.sampled_from(["none", "scale", "full"]))
def test_parts_sum_to_the_total_and_shares_to_one(variant, whiten, case):
    found = run(case, plans(**variant), whiten)
    total, parts = found.advantages.total, found.advantages.parts
    same(sum(parts.values()), total)
    trained = case.shard.response_mask & case.shard.train[:, None]
    assert torch.isfinite(total).all()
    assert torch.all(total[~trained] == 0)
    assert all(math.isfinite(value) for value in found.metrics.values())
    shares = [found.metrics[f"adv/{name}/share"] for name in parts]
    varies = trained.any() and total[trained].double().std(correction=0) > 1e-5
    if varies:
        assert sum(shares) == pytest.approx(1.0, abs=1e-4)


@every_variant
@few
@given(case=cases(), seed=st.integers(0, 999))
def test_rows_in_another_order_get_the_same(variant, case, seed):
    order = torch.randperm(len(case.shard.group), generator=torch.Generator().manual_seed(seed))
    expected, found = run(case, plans(**variant)), run(case.rows(order), plans(**variant))
    same(found.advantages.total, expected.advantages.total[order])
    assert found.metrics == pytest.approx(expected.metrics, abs=1e-5)


@every_variant
@few
@given(case=cases(), width=st.integers(1, 5))
def test_padding_changes_nothing(variant, case, width):
    expected, found = run(case, plans(**variant)), run(case.padded(width), plans(**variant))
    same(found.advantages.total[:, :-width], expected.advantages.total)
    assert found.metrics == pytest.approx(expected.metrics, abs=1e-5)


@every_variant
@few
@given(case=cases(), ranks=st.sampled_from([2, 5]))
def test_shards_change_nothing(variant, ranks, case):
    if variant["normalizer"] is NORMALIZERS["prime_as_released"]:  # as its authors have it: one shard's maximum
        variant = {"normalizer": axes(centre="token_mean_loo_released", scale="return_range", **SCALE_CENTRE)}
    wanted = plans(**variant)
    expected = run(case, wanted)
    # Whole groups to ranks in turn; a rank without any holds no rows. Trailing columns are cut off, as when padding.
    rank_of = torch.unique(case.shard.group, return_inverse=True)[1] % ranks
    members = [torch.nonzero(rank_of == rank).squeeze(1) for rank in range(ranks)]
    pieces = []
    for index in members:
        piece = case.rows(index)
        used = int(piece.shard.attention_mask.sum(1).max()) if len(index) else 1
        pieces.append(piece.padded(used - piece.shard.tokens.shape[1]))
    results = on_ranks(lambda piece, reduce: run(piece, wanted, reduce=reduce), pieces)
    for index, result in zip(members, results, strict=True):
        width = result.advantages.total.shape[1]
        same(result.advantages.total, expected.advantages.total[index][:, :width])
        assert result.metrics == pytest.approx(expected.metrics, abs=1e-5)


@few
@given(case=cases())
def test_the_released_form_keeps_its_local_maximum(case):
    # One rank: the two scales are the same number. This is why only `released` is left out above.
    local = axes(scale="local_return_range", eps=1e-6)
    same(run(case, plans(local)).advantages.total, run(case, plans(NORMALIZERS["return_range"])).advantages.total)


@every_variant
@few
@given(case=cases(), whiten=st.sampled_from(["none", "scale", "full"]))
def test_process_weight_zero_is_outcome_only(variant, whiten, case):
    found = run(case, plans(**variant, weight=0.0), whiten)
    outcome = {"outcome": outcome_stream(case.shard)}
    alone = credit(case.shard, outcome, plans(RAW)[:1], Identity(), whiten=whiten, trust={})
    assert torch.equal(found.advantages.total, alone.advantages.total)
    assert found.metrics["adv/process/share"] == 0


@few
@given(case=cases(), gamma=st.floats(0.5, 1.0), lam=st.floats(0.5, 1.0))
def test_a_critic_keeps_the_decomposition(case, gamma, lam):
    values = torch.where(case.shard.response_mask, case.process.rewards.nan_to_num(0.25), torch.nan)
    found = run(
        case, [*plans(RAW, estimator=none)[1:], replace(plans(RAW)[0], normalizer=RAW, estimator=none)],
        whiten="none", values=values, critic=CriticPlan(gamma=gamma, lam=lam),
    )  # fmt: skip
    same(sum(found.advantages.parts.values()), found.advantages.total)
    trained = case.shard.response_mask & case.shard.train[:, None]
    same(found.value_targets, torch.where(trained, found.advantages.total + values, 0.0))
