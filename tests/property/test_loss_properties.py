"""Loss and gradient of an optimizer step do not depend on how it is cut up: micro-batches, layout, padding, ranks."""

from __future__ import annotations

import functools
import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlprm.contract.ranks import on_ranks
from rlprm.core.alignment import token_entropy, token_logprobs
from rlprm.core.kl import kl_loss
from rlprm.core.packing import build_micro, micro_batches
from rlprm.core.policy_loss import Choices, Denominators, aggregation_weights, ppo_clip, weighted_sum
from rlprm.core.policy_loss_free import cispo, reinforce, sapo
from rlprm.core.policy_loss_sequence import gspo, gspo_token
from rlprm.core.reduce import Identity

VOCABULARY = 7
MODES = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "token-sum"]
PPO = functools.partial(ppo_clip, clip_low=0.2, clip_high=0.28, dual_clip=3.0)
# Bounds so wide that the random ratios of these tests lie on either side of them.
SURROGATES = {
    "ppo_clip": PPO,
    "gspo": functools.partial(gspo, clip_low=0.4, clip_high=0.6),
    "gspo_token": functools.partial(gspo_token, clip_low=0.4, clip_high=0.6),
    "cispo": functools.partial(cispo, clip_low=0.5, clip_high=0.5),
    "sapo": functools.partial(sapo, tau_positive=1.0, tau_negative=1.05),
    "reinforce": reinforce,
}
few = settings(max_examples=15, deadline=None, derandomize=True)


@st.composite
def batches(draw):
    """Flat fields of some sequences; one of them may have no response token at all."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    count = draw(st.integers(2, 7))
    responses = torch.randint(0, 6, (count,), generator=generator)
    responses[0] = 3
    prompts = torch.randint(1, 4, (count,), generator=generator)
    lengths = prompts + responses
    total = int(lengths.sum())
    ends = lengths.cumsum(0).repeat_interleave(lengths)
    mask = torch.arange(total) >= ends - responses.repeat_interleave(lengths)

    def values(scale: float, shift: float = 0.0) -> torch.Tensor:
        return torch.where(mask, scale * torch.randn(total, generator=generator) + shift, torch.nan)

    return {
        "lengths": lengths,
        "responses": responses,
        "tokens": torch.randint(VOCABULARY, (total,), generator=generator),
        "mask": mask,
        "fields": {"old": values(0.5, -2.0), "ref": values(0.5, -2.0), "advantages": values(1.0)},
        "outcome": torch.randint(0, 2, (count,), generator=generator).float(),
        "model": 0.5 * torch.randn(VOCABULARY, VOCABULARY, generator=generator),
    }


def micro_loss(model, micro, mode, denominators, surrogate=PPO):
    """A bigram model: the logits at a token depend on that token, so every shift or mix-up shows."""
    logits = model[micro.tokens]
    logprobs = token_logprobs(logits, micro.tokens, micro.sequence, 0.8)
    mask, fields = micro.response_mask, micro.token_fields
    loss, _ = surrogate(
        Choices(
            logprobs=logprobs,
            old_logprobs=fields["old"],
            advantages=fields["advantages"],
            response_mask=mask,
            sequence=micro.sequence,
            num_sequences=micro.num_sequences,
        )
    )
    loss = loss + 0.1 * kl_loss(logprobs, fields["ref"], mask, kind="straight_through")
    loss = loss - 0.01 * torch.where(mask, token_entropy(logits, micro.sequence, 0.8), 0.0)
    horizon = 8 if mode == "seq-mean-token-sum-norm" else None
    weights = aggregation_weights(
        mask, micro.sequence, micro.num_sequences, mode=mode, denominators=denominators, horizon=horizon
    )
    return weighted_sum(loss, weights)


def loss_and_gradient(batch, loss_of, mode, members, layout, denominators):
    model = batch["model"].clone().requires_grad_()
    total = torch.zeros(())
    for part in members:
        micro = build_micro(
            part,
            batch["lengths"],
            batch["tokens"],
            batch["mask"],
            batch["fields"],
            {"outcome": batch["outcome"]},
            layout,
        )
        loss = loss_of(model, micro, mode, denominators)
        loss.backward()
        total = total + loss.detach()
    return total, model.grad


def close(found, expected):
    """Relative error of the whole gradient vector."""
    (loss, gradient), (expected_loss, expected_gradient) = found, expected
    assert torch.isfinite(gradient).all()
    assert abs(float(loss - expected_loss)) <= 1e-5 * max(1.0, abs(float(expected_loss)))
    assert float((gradient - expected_gradient).norm()) <= 1e-5 * float(expected_gradient.norm()) + 1e-9


def whole_step(batch, loss_of, mode):
    denominators = Denominators.count(batch["responses"], Identity())
    every = [list(range(len(batch["lengths"])))]
    return denominators, loss_and_gradient(batch, loss_of, mode, every, "padded", denominators)


@pytest.mark.parametrize("mode", MODES)
@few
@given(batch=batches(), budget=st.integers(4, 40), most=st.integers(1, 4))
def test_policy_loss_does_not_depend_on_micro_batches_or_layout(mode, batch, budget, most):
    denominators, expected = whole_step(batch, micro_loss, mode)
    for layout in ("padded", "packed"):
        members = micro_batches(batch["lengths"].tolist(), budget, most, layout)
        assert sorted(functools.reduce(operator.iadd, members, [])) == list(range(len(batch["lengths"])))
        close(loss_and_gradient(batch, micro_loss, mode, members, layout, denominators), expected)


@pytest.mark.parametrize("name", SURROGATES)
@few
@given(batch=batches(), budget=st.integers(4, 40), most=st.integers(1, 4))
def test_no_surrogate_depends_on_micro_batches_or_layout(name, batch, budget, most):
    loss_of = functools.partial(micro_loss, surrogate=SURROGATES[name])
    denominators, expected = whole_step(batch, loss_of, "seq-mean-token-mean")
    for layout in ("padded", "packed"):
        members = micro_batches(batch["lengths"].tolist(), budget, most, layout)
        close(loss_and_gradient(batch, loss_of, "seq-mean-token-mean", members, layout, denominators), expected)


@st.composite
def unmoved(draw):
    """Sequences of one to six tokens at which pi is pi_old, with any advantages, in one packed row."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    total = sum(lengths)
    old = -3 * torch.rand(1, total, generator=generator, dtype=torch.float64)
    return Choices(
        logprobs=old.clone().requires_grad_(),
        old_logprobs=old,
        advantages=torch.randn(1, total, generator=generator, dtype=torch.float64),
        response_mask=torch.ones(1, total, dtype=torch.bool),
        sequence=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None],
        num_sequences=len(lengths),
    )


@pytest.mark.parametrize("name", SURROGATES)
@few
@given(choices=unmoved())
def test_every_surrogate_is_the_policy_gradient_where_nothing_has_moved(name, choices):
    """Per token ``-A``; gspo alone gives each token the mean advantage of its sequence. (Values differ: cispo and
    reinforce are ``-A log pi``, sapo ``-2 A / tau``, the others ``-A``.)"""
    SURROGATES[name](choices)[0].sum().backward()
    gain = choices.advantages
    if name == "gspo":
        sums = torch.zeros(choices.num_sequences, dtype=torch.float64).index_add(0, choices.sequence[0], gain[0])
        gain = (sums / torch.bincount(choices.sequence[0]))[choices.sequence]
    torch.testing.assert_close(choices.logprobs.grad, -gain)


@pytest.mark.parametrize("mode", MODES)
@few
@given(batch=batches())
def test_policy_loss_does_not_depend_on_the_number_of_ranks(mode, batch):
    _, expected = whole_step(batch, micro_loss, mode)

    def work(rank, reduce):
        mine = list(range(rank, len(batch["lengths"]), 2))
        denominators = Denominators.count(batch["responses"][mine], reduce)
        loss, gradient = loss_and_gradient(batch, micro_loss, mode, [mine], "packed", denominators)
        return reduce.sum(loss), reduce.sum(gradient)

    for found in on_ranks(work, [0, 1]):
        close(found, expected)


@few
@given(
    lengths=st.lists(st.integers(1, 50), max_size=20),
    budget=st.integers(1, 60),
    most=st.integers(1, 5),
    layout=st.sampled_from(["padded", "packed"]),
)
def test_micro_batches_hold_each_sequence_once_within_the_budget(lengths, budget, most, layout):
    members = micro_batches(lengths, budget, most, layout)
    assert sorted(functools.reduce(operator.iadd, members, [])) == list(range(len(lengths)))
    for part in members:
        sizes = [lengths[index] for index in part]
        cost = len(sizes) * max(sizes) if layout == "padded" else sum(sizes)
        assert len(part) <= most
        assert cost <= budget or len(part) == 1
