from __future__ import annotations

import pytest
import torch

from rlprm.core.kl import k1, k2, k3, kl_loss
from rlprm.core.reduce import Identity
from rlprm.core.value import explained_variance, value_loss
from rlprm.errors import ConfigError

ON = torch.tensor([[True, False]])


def test_estimators_golden():
    # d = 0.2: 0.2; 0.02; e^-0.2 - 1 + 0.2 = 0.018731
    d = torch.tensor(0.2)
    assert (k1(d).item(), k2(d).item(), k3(d).item()) == pytest.approx((0.2, 0.02, 0.018731), abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "value", "slope"),
    [
        ("k2", 0.02, 0.2),  # gradient d
        ("k3", 0.018731, 0.181269),  # gradient 1 - e^-d
        ("straight_through", 0.018731, 0.2),  # the value of one, the gradient of the other
    ],
)
def test_kl_loss(kind, value, slope):
    logprobs = torch.tensor([[0.2, torch.nan]], requires_grad=True)
    loss = kl_loss(logprobs, torch.tensor([[0.0, torch.nan]]), ON, kind=kind)
    loss.sum().backward()
    assert loss[0].tolist() == pytest.approx([value, 0.0], abs=1e-6)
    assert logprobs.grad[0].tolist() == pytest.approx([slope, 0.0], abs=1e-6)


def test_k1_loss_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match="zero expected gradient"):
        getattr(kl_loss, "__wrapped__", kl_loss)(torch.zeros(1, 1), torch.zeros(1, 1), ON[:, :1], kind="k1")


def test_k1_really_has_zero_expected_gradient_and_k2_that_of_the_reverse_kl():
    # exact expectation over three tokens of a softmax policy
    logits = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()

    def expected_gradient(estimator):
        logprobs = logits.log_softmax(0)
        return torch.autograd.grad((logprobs.exp().detach() * estimator(logprobs - ref)).sum(), logits)[0]

    logprobs = logits.log_softmax(0)
    (reverse_kl,) = torch.autograd.grad((logprobs.exp() * (logprobs - ref)).sum(), logits)
    torch.testing.assert_close(expected_gradient(k1), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(expected_gradient(k2), reverse_kl)
    assert (expected_gradient(k3) - reverse_kl).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("clip", "loss", "clipped"),
    [
        (None, 0.5, 0.0),  # (2 - 1)^2 / 2
        (0.5, 0.5, 0.0),  # clipped to 0.5: 0.25 / 2 is smaller, the larger counts
    ],
)
def test_value_loss_takes_the_larger_error(clip, loss, clipped):
    new, old, target = torch.tensor([[2.0, torch.nan]]), torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, torch.nan]])
    found, decided = value_loss(new, old, target, ON, clip=clip)
    assert found.tolist() == [[loss, 0.0]]
    assert decided.tolist() == [[clipped, 0.0]]


def test_value_loss_is_flat_where_the_clip_decides():
    # V 2 against target 2, clipped to 0.5: 1.5^2 / 2 = 1.125, no gradient
    new = torch.tensor([[2.0, torch.nan]], requires_grad=True)
    found, decided = value_loss(new, torch.zeros(1, 2), torch.tensor([[2.0, 0.0]]), ON, clip=0.5)
    found.sum().backward()
    assert found.tolist() == [[1.125, 0.0]]
    assert decided.tolist() == [[1.0, 0.0]]
    assert new.grad.tolist() == [[0.0, 0.0]]
    with pytest.raises(ConfigError, match="value clip"):
        value_loss(new, new, new, ON, clip=0.0)


def test_explained_variance():
    # targets 0, 2 (sum of squares 2); errors 1, 0 (sum of squares 0.5): 1 - 0.25
    mask = torch.tensor([[True, True, False]])
    target = torch.tensor([[0.0, 2.0, torch.nan]])
    assert explained_variance(torch.tensor([[-1.0, 2.0, torch.nan]]), target, mask, Identity()) == pytest.approx(0.75)
    assert explained_variance(target, torch.ones(1, 3), mask, Identity()) is None
