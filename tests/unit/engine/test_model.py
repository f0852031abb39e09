"""Loading, both layouts, and the chunked log-prob head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlprm.core.alignment import token_entropy, token_logprobs
from rlprm.core.packing import build_micro
from rlprm.engine import model as models
from rlprm.errors import AlignmentError, ConfigError
from rlprm.records import MicroBatch
from tests.integration import tiny_models

LENGTHS = torch.tensor([7, 2, 12])
PROMPTS = (3, 1, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.folder(tmp_path_factory.mktemp("model"), 0, True)


@pytest.fixture(scope="module")
def causal(folder: str) -> torch.nn.Module:
    return models.load_causal(folder, "float32", attention="sdpa", gradient_checkpointing=False)


def micro(layout: str) -> MicroBatch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, tiny_models.VOCABULARY, (int(LENGTHS.sum()),), generator=generator)
    response = torch.cat([torch.arange(int(n)) >= p for n, p in zip(LENGTHS, PROMPTS, strict=True)])
    return build_micro([0, 1, 2], LENGTHS, tokens, response, {"place": torch.arange(len(tokens))}, {}, layout)  # type: ignore[arg-type]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_each_sequence_is_scored_as_if_it_were_alone(folder: str, layout: str, attention: str) -> None:
    model = models.load_causal(folder, "float32", attention=attention, gradient_checkpointing=False)  # type: ignore[arg-type]
    batch = micro(layout)
    found, _ = models.response_logprobs(model, batch, 0.6, entropy=False)
    plain = tiny_models.model(0, True)
    for row, prompt in enumerate(PROMPTS):
        mine = batch.sequence == row
        alone = tiny_models.logprobs(plain, batch.tokens[mine].tolist(), 0.6)
        assert torch.allclose(found[mine][prompt:], alone[prompt - 1 :], atol=2e-6)
    assert not found[~batch.response_mask].any()


def test_packed_text_of_a_neighbour_changes_nothing(causal: torch.nn.Module) -> None:
    batch = micro("packed")
    changed = batch.tokens.clone()
    changed[batch.sequence == 0] = 3
    other = MicroBatch(**{name: getattr(batch, name) for name in batch.__slots__} | {"tokens": changed})
    before, after = (models.response_logprobs(causal, one, 1.0, entropy=False)[0] for one in (batch, other))
    assert torch.equal(before[batch.sequence > 0], after[batch.sequence > 0])
    assert not torch.equal(before, after)


def test_packed_rows_must_be_one(causal: torch.nn.Module) -> None:
    padded = micro("padded")
    wrong = MicroBatch(**{name: getattr(padded, name) for name in padded.__slots__} | {"packed": True})
    with pytest.raises(AlignmentError, match="has 3 rows; expected one"):
        models.hidden_states(causal, wrong)


def test_chunked_head_equals_the_plain_one_with_its_gradient(
    causal: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "LOGITS_PER_CHUNK", 3 * tiny_models.VOCABULARY)  # 13 response tokens: 5 chunks
    batch = micro("packed")
    gain = torch.randn(batch.tokens.shape, generator=torch.Generator().manual_seed(2))

    def gradients(logprobs: torch.Tensor, entropy: torch.Tensor) -> dict[str, torch.Tensor]:
        causal.zero_grad()
        ((logprobs * gain + entropy * gain**2) * batch.response_mask).sum().backward()
        return {name: parameter.grad.clone() for name, parameter in causal.named_parameters()}

    logprobs, entropy = models.response_logprobs(causal, batch, 0.7, entropy=True)
    logits = models.forward(causal, batch)
    plain = token_logprobs(logits, batch.tokens, batch.sequence, 0.7)
    plain_entropy = token_entropy(logits, batch.sequence, 0.7)
    assert entropy is not None
    assert torch.allclose(logprobs, plain * batch.response_mask, atol=1e-6)
    assert torch.allclose(entropy, plain_entropy * batch.response_mask, atol=1e-6)
    found, expected = gradients(logprobs, entropy), gradients(plain, plain_entropy)
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-5), name


def test_gradient_of_the_head_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "LOGITS_PER_CHUNK", 14)  # two rows of seven logits
    torch.manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((5, 3), (7, 3), (7,))
    )
    tokens = torch.tensor([0, 6, 3, 3, 1])
    assert torch.autograd.gradcheck(
        lambda h, w, b: models.ChunkedLogProbs.apply(h, w, b, tokens, 0.8), (hidden, weight, bias)
    )


def test_nan_of_a_token_without_weight_does_not_leak() -> None:
    hidden = torch.tensor([[1.0, 2.0], [float("nan"), 1.0]], requires_grad=True)
    weight = torch.eye(2, requires_grad=True)
    logprobs, _ = models.ChunkedLogProbs.apply(hidden, weight, None, torch.tensor([0, 1]), 1.0)
    logprobs[0].backward()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


def test_values_start_at_zero_and_keep_a_trained_head(folder: str, tmp_path: Path) -> None:
    model = models.load_value(folder, "float32", attention="sdpa", gradient_checkpointing=False)
    batch = micro("padded")
    assert models.is_value_model(model)
    assert not models.response_values(model, batch).any()
    with torch.no_grad():
        model.score.weight.fill_(0.5)
        model.score.bias.fill_(1.0)
    values = models.response_values(model, batch)
    # the value of token t is that of the state before it: from the hidden state of t - 1
    hidden = models.hidden_states(model, batch)
    assert torch.allclose(values[0, 3], 0.5 * hidden[0, 2].sum() + 1, atol=1e-5)
    model.save_pretrained(tmp_path / "critic")
    again = models.load_value(str(tmp_path / "critic"), "float32", attention="sdpa", gradient_checkpointing=False)
    assert torch.equal(again.score.weight, model.score.weight)
    assert torch.allclose(models.response_values(again, batch), values, atol=1e-5)


def test_there_is_no_dropout(causal: torch.nn.Module, folder: str) -> None:
    value = models.load_value(folder, "float32", attention="sdpa", gradient_checkpointing=False)
    rates = [m.p for one in (causal, value) for m in one.modules() if isinstance(m, torch.nn.Dropout)]
    assert rates == [0.0]  # transformers would give the value head 0.1
    assert causal.config.attention_dropout == 0.0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_changes_no_gradient(folder: str, checkpointing: bool) -> None:
    model = models.load_causal(folder, "float32", attention="sdpa", gradient_checkpointing=checkpointing).train()
    models.response_logprobs(model, micro("packed"), 1.0, entropy=False)[0].sum().backward()
    plain = models.load_causal(folder, "float32", attention="sdpa", gradient_checkpointing=False).train()
    models.response_logprobs(plain, micro("packed"), 1.0, entropy=False)[0].sum().backward()
    assert model.is_gradient_checkpointing is checkpointing
    for (name, one), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name


def test_missing_things_are_named(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: object) -> object:
        return models.load_causal(str(path), "float32", attention="sdpa", gradient_checkpointing=False)

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(ConfigError, match=r"nowhere does not exist; give an existing folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="downloads are off"):
        load("rlprm-tests/no-such-model")
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        load(tmp_path)
    tiny_models.config(True).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="cannot be loaded as AutoModelForCausalLM"):
        load(tmp_path)
    from safetensors.torch import load_file, save_file

    weights = load_file(Path(folder) / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 weights \(model.norm.weight\)"):
        load(tmp_path)
