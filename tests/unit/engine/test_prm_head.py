"""PRM folders of every family give the number that their weights say, without code from the folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlprm.engine.prm_head import load_prm, made_head
from rlprm.errors import ConfigError
from tests.unit.engine import tiny_prm


def load(
    path: str,
    head: str = "classifier",
    *,
    attention: str = "sdpa",
    layout: str = "padded",
    token_budget: int = 64,
    candidates=None,
):
    return load_prm(
        path,
        "float32",
        attention=attention,
        head=head,
        candidates=candidates,
        token_budget=token_budget,
        layout=layout,
        device="cpu",
    )


TOKENS = tiny_prm.tokenizer()
SEQUENCES = [TOKENS("?a\n!\n")["input_ids"], TOKENS("?!!\n")["input_ids"], TOKENS("?")["input_ids"]]
POSITIONS = [[2, 4], [3], []]
# After "?a\n" no token is bad. After "?a\n!\n" one of five is: f = 0.2, hidden (2, 2, 2, 1.6), rms sqrt(14.56 / 4) = 1.907878,
# logit -10 * (2 - 1.6) / 1.907878 = -2.096570, sigmoid 0.109431. After "?!!\n" two of four: f = 0.5, hidden (2, 2, 2, 1),
# rms sqrt(13 / 4) = 1.802776, logit -10 / 1.802776 = -5.547002, sigmoid 0.003884.
EXPECTED = [[0.5, 0.109431], [0.003884], []]


def check(prm) -> None:
    found = prm.probabilities(SEQUENCES, POSITIONS)
    for numbers, expected in zip(found, EXPECTED, strict=True):
        assert numbers.tolist() == pytest.approx(expected, abs=1e-5)


def test_chance_in_the_comments_is_what_the_formula_of_tests_gives():
    assert [tiny_prm.chance(0, 3), tiny_prm.chance(1, 5), tiny_prm.chance(2, 4)] == pytest.approx(
        [0.5, 0.109431, 0.003884], abs=1e-6
    )


@pytest.mark.parametrize("head", ["one", "two", "mlp"])
def test_every_classification_head_gives_its_number(tmp_path: Path, head: str):
    check(load(tiny_prm.folder(tmp_path, head)))


def test_value_head_gives_its_number(tmp_path: Path):
    check(load(tiny_prm.folder(tmp_path, "value"), "value"))


def test_vocabulary_head_reads_two_tokens(tmp_path: Path):
    ids = tuple(TOKENS.convert_tokens_to_ids(word) for word in ("-", "+"))
    check(load(tiny_prm.folder(tmp_path, "none"), "vocabulary", candidates=ids))


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("token_budget", [1, 9, 1000])
def test_neighbours_in_a_pass_change_nothing(tmp_path: Path, layout: str, token_budget: int):
    check(load(tiny_prm.folder(tmp_path, "one"), layout=layout, token_budget=token_budget))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("saved", "head"), [("one", "classifier"), ("none", "vocabulary")])
def test_attention_is_the_one_that_was_asked_for(tmp_path: Path, saved: str, head: str, attention: str):
    ids = tuple(TOKENS.convert_tokens_to_ids(word) for word in ("-", "+"))
    prm = load(tiny_prm.folder(tmp_path, saved), head, attention=attention, candidates=ids)
    assert prm._model.config._attn_implementation == attention
    check(prm)


def test_code_in_the_folder_is_never_run(tmp_path: Path):
    check(load(tiny_prm.folder(tmp_path, "mlp", remote=True)))


def test_no_sequences_give_no_numbers(tmp_path: Path):
    assert load(tiny_prm.folder(tmp_path, "one")).probabilities([], []) == []


@pytest.mark.parametrize(
    ("saved", "asked", "message"),
    [
        ("none", "classifier", r"has no weights score\.\* or classifier\.\* \(there are: lm_head, model\.\*\)"),
        ("one", "value", r"has no weights v_head\.summary\.\* \(there are: model, score\.\*\)"),
        ("value", "classifier", r"\(there are: model, v_head\.\*\).*choose the format"),
    ],
)
def test_head_of_another_family_is_named(tmp_path: Path, saved: str, asked: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load(tiny_prm.folder(tmp_path, saved), asked)


def test_pickled_weights_are_refused(tmp_path: Path):
    path = Path(tiny_prm.folder(tmp_path, "one"))
    torch.save({}, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has no safetensors files.*save the model as safetensors"):
        load(str(path))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"weight": torch.zeros(3, 4)}, "has 3 labels; expected 1 .* or 2"),
        (
            {"0.weight": torch.zeros(4, 4), "2.weight": torch.zeros(2, 4)},
            "has the weights 0.weight, 2.weight; expected",
        ),
        ({"weight": torch.zeros(1, 4), "gain": torch.zeros(1)}, "has the weights gain, weight; expected"),
    ],
)
def test_heads_that_nobody_knows_are_refused(weights, message):
    with pytest.raises(ConfigError, match=message):
        made_head(weights, "prm")
