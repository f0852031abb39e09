from __future__ import annotations

import pytest
import torch

from rlprm.core import alignment
from rlprm.core.alignment import token_entropy, token_logprobs, token_values
from rlprm.errors import ConfigError


def reference_logprobs(logits: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    """Row by row, by the book."""
    found = torch.zeros_like(tokens, dtype=logits.dtype)
    for b in range(tokens.shape[0]):
        for t in range(1, tokens.shape[1]):
            found[b, t] = torch.log_softmax(logits[b, t - 1] / temperature, -1)[tokens[b, t]]
    return found


def test_entry_t_describes_token_t_from_the_logits_before_it():
    # logits at 0 say p(token 1) = e^2/(e^2+1) = 0.880797 at T = 1 -> log -0.126928; at T = 2: e/(e+1), log -0.313262
    logits = torch.tensor([[[0.0, 2.0], [7.0, 7.0]]])
    tokens, sequence = torch.tensor([[0, 1]]), torch.tensor([[0, 0]])
    assert token_logprobs(logits, tokens, sequence, 1.0)[0].tolist() == pytest.approx([0.0, -0.126928], abs=1e-6)
    assert token_logprobs(logits, tokens, sequence, 2.0)[0].tolist() == pytest.approx([0.0, -0.313262], abs=1e-6)


def test_packed_row_equals_separate_rows():
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    padded = torch.tensor([[0, 0, 0], [1, 1, -1]])
    apart = token_logprobs(logits, tokens, padded, 1.0)
    real = padded >= 0
    together = token_logprobs(logits[real][None], tokens[real][None], padded[real][None], 1.0)
    torch.testing.assert_close(together[0], apart[real])
    assert together[0, 3] == 0  # the first token of the second sequence has no prediction


@pytest.mark.parametrize("chunk", [1, 2, 4096])
def test_values_and_gradients_do_not_depend_on_the_chunk(chunk, monkeypatch):
    monkeypatch.setattr(alignment, "CHUNK", chunk)
    torch.manual_seed(0)
    tokens, sequence = torch.randint(5, (2, 4)), torch.zeros(2, 4, dtype=torch.int64)
    upstream = torch.randn(2, 4, dtype=torch.float64)
    logits = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    found = token_logprobs(logits, tokens, sequence, 0.7)
    expected = reference_logprobs(logits, tokens, 0.7)
    torch.testing.assert_close(found, expected)
    (by_chunks,) = torch.autograd.grad((found * upstream).sum(), logits)
    (by_book,) = torch.autograd.grad((expected * upstream).sum(), logits)
    torch.testing.assert_close(by_chunks, by_book)


def test_gradients_pass_gradcheck():
    torch.manual_seed(0)
    logits = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
    tokens, sequence = torch.tensor([[0, 2, 1, 1]]), torch.tensor([[0, 0, 1, 1]])
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, tokens, sequence, 0.6), (logits,))
    assert torch.autograd.gradcheck(lambda x: token_entropy(x, sequence, 0.6), (logits,))


def test_bf16_logits_are_worked_in_float32():
    logits = torch.randn(1, 3, 100, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    tokens, sequence = torch.tensor([[1, 2, 3]]), torch.tensor([[0, 0, 0]])
    found = token_logprobs(logits, tokens, sequence, 1.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, reference_logprobs(logits.float(), tokens, 1.0), atol=1e-6, rtol=0)


def test_nan_logits_of_padding_leak_neither_forward_nor_backward():
    logits = torch.zeros(1, 3, 4)
    logits[0, 1:] = torch.nan
    logits.requires_grad_()
    sequence = torch.tensor([[0, 0, -1]])
    values = token_logprobs(logits, torch.tensor([[0, 1, 2]]), sequence, 1.0) + token_entropy(logits, sequence, 1.0)
    values.sum().backward()
    assert torch.isfinite(values).all()
    assert torch.isfinite(logits.grad).all()


def test_entropy_of_a_forbidden_token():
    # logits (0, 0, -inf): two equal choices, entropy log 2 = 0.693147; -inf must give no NaN, here or in the gradient
    logits = torch.tensor([[[0.0, 0.0, -torch.inf], [0.0, 0.0, 0.0]]], requires_grad=True)
    entropy = token_entropy(logits, torch.tensor([[0, 0]]), 1.0)
    entropy.sum().backward()
    assert entropy[0, 1].item() == pytest.approx(0.693147, abs=1e-6)
    assert torch.isfinite(logits.grad).all()


def test_values_shift_within_a_sequence_only():
    found = token_values(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[0, 0, 1, 1]]))
    assert found.tolist() == [[0.0, 1.0, 0.0, 3.0]]


def test_temperature_zero_is_refused():
    with pytest.raises(ConfigError, match=r"temperature is 0\.0"):
        token_entropy(torch.zeros(1, 2, 3), torch.tensor([[0, 0]]), 0.0)
