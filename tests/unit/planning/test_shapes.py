"""Shapes that ship count the very parameters that transformers makes, and are found by the names people use."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from rlprm.errors import ConfigError
from rlprm.paths import cluster_dir
from rlprm.planning.shapes import Shape, from_config, shape_named, shape_of, shapes

MADE = ("qwen2.5-0.5b", "qwen2.5-math-7b", "qwen3-0.6b", "qwen3-8b", "llama-3.2-1b", "llama-3.1-70b")


def rows() -> dict[str, int]:
    """The count in the comment above each row, by name; they are those that the hub shows."""
    text = "".join(file.read_text("utf-8") for file in sorted((cluster_dir() / "shapes").glob("*.yaml")))
    found = re.findall(r'# ([\d,]+) parameters.*\n  "([^"]+)"', text)
    return {name: int(count.replace(",", "")) for count, name in found}


def made(shape: Shape):
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    kind = Qwen3Config if shape.qk_norm else Qwen2Config if shape.qkv_bias else LlamaConfig
    return kind(
        hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim, intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary, tie_word_embeddings=shape.tied,
    )  # fmt: skip


@pytest.mark.parametrize("name", MADE)
def test_transformers_makes_as_many_parameters(name: str) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    shape = shapes()[name]
    config = made(shape)
    config.num_labels = 1
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(config)
        value = AutoModelForTokenClassification.from_config(config) if shape.layers < 40 else None
    causal.tie_weights()
    assert sum(each.numel() for each in causal.parameters()) == shape.parameters
    if value is not None:
        assert sum(each.numel() for each in value.parameters()) == shape.value_parameters


def test_every_shape_has_the_count_that_its_comment_says() -> None:
    said = rows()
    assert set(said) == set(shapes())
    assert {name: shape.parameters for name, shape in shapes().items()} == said


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("PRIME-RL/Eurus-2-7B-SFT", "qwen2.5-math-7b"),
        ("/data/models/Qwen2.5-Math-1.5B-Instruct/", "qwen2.5-math-1.5b"),
        ("qwen/qwen2.5-0.5b", "qwen2.5-0.5b"),
        ("Qwen/Qwen3-4B-Base", "qwen3-4b"),
        ("meta-llama/Llama-3.2-3B-Instruct", "llama-3.2-3b"),
    ],
)
def test_a_hub_name_finds_its_shape(path: str, name: str) -> None:
    assert shape_of(path, None).name == name


def test_an_unknown_name_is_refused_with_the_nearest_and_all() -> None:
    with pytest.raises(ConfigError, match=r"nearest name is 'qwen2\.5-0\.5b'.*--shape NAME.*llama-3\.1-70b"):
        shape_named("org/Qwen2.5-0.6B")


def test_a_folder_says_itself_what_it_is(tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
              "intermediate_size": 96, "vocab_size": 100}  # fmt: skip
    folder = tmp_path / "Qwen2.5-7B"  # the file counts, not the name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shape = shape_of(str(folder), None)
    assert (shape.hidden, shape.kv_heads, shape.head_dim, shape.tied) == (64, 4, 16, False)
    assert shape_of(str(folder), "qwen3-8b").name == "qwen3-8b"


def test_a_family_that_is_not_modelled_and_a_broken_config_are_refused() -> None:
    with pytest.raises(ConfigError, match="of type 'mamba'"):
        from_config("m", {"model_type": "mamba"})
    with pytest.raises(ConfigError, match="has no num_hidden_layers, num_attention_heads"):
        from_config("m", {"model_type": "qwen2", "hidden_size": 8})
