"""The gradient of a PRM's loss is that of the whole step at once, however rows are dealt to ranks and micro-batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlprm.contract.ranks import on_ranks
from rlprm.core.alignment import token_logprobs
from rlprm.core.implicit import implicit_rewards, sequence_sums
from rlprm.core.packing import build_micro, micro_batches
from rlprm.core.prm_losses import slopes
from rlprm.core.reduce import Identity
from tests.unit.core.test_prm_losses import EVERY

VOCABULARY = 7
BETA = 0.5
STATE = {"right": 0.3, "wrong": -0.1}  # BCO's; the others carry none
few = settings(max_examples=12, deadline=None, derandomize=True)


@st.composite
def steps(draw):
    """Flat responses to five prompts; outcomes right, wrong and in between; some not judged."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    count = draw(st.integers(5, 12))
    prompts = torch.randint(1, 4, (count,), generator=generator)
    responses = torch.randint(0, 6, (count,), generator=generator)
    lengths = prompts + responses
    total = int(lengths.sum())
    mask = torch.arange(total) >= (lengths.cumsum(0) - responses).repeat_interleave(lengths)
    return {
        "lengths": lengths,
        "tokens": torch.randint(VOCABULARY, (total,), generator=generator),
        "mask": mask,
        "base": torch.where(mask, 0.5 * torch.randn(total, generator=generator) - 2, torch.nan),
        "group": torch.randint(0, 5, (count,), generator=generator),
        "outcome": torch.tensor([0.0, 1.0, 0.5, 0.75])[torch.randint(0, 4, (count,), generator=generator)],
        "present": torch.rand(count, generator=generator) < 0.85,
        "model": 0.5 * torch.randn(VOCABULARY, VOCABULARY, generator=generator),
    }


def sums_of(model, step, rows, layout):
    """r(y) of these rows, with the graph of a bigram model."""
    micro = build_micro(rows, step["lengths"], step["tokens"], step["mask"], {"base": step["base"]}, {}, layout)
    logprobs = token_logprobs(model[micro.tokens], micro.tokens, micro.sequence, 1.0)
    rewards = implicit_rewards(logprobs, micro.token_fields["base"], micro.response_mask, BETA)
    return sequence_sums(rewards, micro.sequence, micro.num_sequences)


def naive(step, loss):
    """Loss and gradient by plain autograd through all responses at once."""
    model = step["model"].clone().requires_grad_()
    rewards = sums_of(model, step, list(range(len(step["lengths"]))), "padded")
    share = loss(rewards, step["outcome"], step["present"], step["group"], Identity(), STATE)
    if not share.loss.requires_grad:
        return share, torch.zeros_like(model)
    return share, torch.autograd.grad(share.loss, model)[0]


def by_slopes(step, loss, rows, reduce, budget, layout):
    """The same as training does it: rewards first, then one micro-batch after another."""
    model = step["model"].clone().requires_grad_()
    with torch.no_grad():
        rewards = sums_of(model, step, rows, "padded") if rows else torch.zeros(0)
    picked = torch.tensor(rows, dtype=torch.int64)
    share, slope = slopes(
        loss, rewards, *(step[name][picked] for name in ("outcome", "present", "group")), reduce, STATE
    )
    for members in micro_batches(step["lengths"][picked].tolist(), budget, 8, layout):
        (slope[members] * sums_of(model, step, [rows[member] for member in members], layout)).sum().backward()
    return share, torch.zeros_like(model) if model.grad is None else model.grad


def close(found, expected):
    (share, gradient), (expected_share, expected_gradient) = found, expected
    assert abs(float(share.loss - expected_share.loss.detach())) <= 1e-5
    assert share.terms == pytest.approx(expected_share.terms)
    assert share.pairs == expected_share.pairs
    assert share.state == pytest.approx(expected_share.state)
    assert float((gradient - expected_gradient).norm()) <= 1e-5 * float(expected_gradient.norm()) + 1e-8


@pytest.mark.parametrize("name", EVERY)
@few
@given(step=steps(), budget=st.integers(4, 40), layout=st.sampled_from(["padded", "packed"]))
def test_the_split_into_micro_batches_leaves_no_trace(name, step, budget, layout):
    rows = list(range(len(step["lengths"])))
    close(by_slopes(step, EVERY[name], rows, Identity(), budget, layout), naive(step, EVERY[name]))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("ranks", [1, 2, 5])
@few
@given(step=steps())
def test_the_number_of_ranks_leaves_no_trace(name, ranks, step):
    expected = naive(step, EVERY[name])

    def work(rank, reduce):
        mine = [row for row, group in enumerate(step["group"].tolist()) if group % ranks == rank]  # whole groups
        share, gradient = by_slopes(step, EVERY[name], mine, reduce, 20, "packed")
        return share, reduce.sum(share.loss), reduce.sum(gradient)

    for share, loss, gradient in on_ranks(work, list(range(ranks))):
        assert float(loss) == pytest.approx(float(expected[0].loss.detach()), abs=1e-5)
        assert share.terms == pytest.approx(expected[0].terms)
        assert share.pairs == expected[0].pairs
        assert share.state == pytest.approx(expected[0].state)
        assert float((gradient - expected[1]).norm()) <= 1e-5 * float(expected[1].norm()) + 1e-8
