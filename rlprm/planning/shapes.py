"""The shape of a model: from its config.json, or from the tables of common ones in ``cluster/shapes/``."""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlprm.errors import ConfigError
from rlprm.paths import cluster_dir

# What these families add to the plain decoder: biases of queries, keys and values; norms of queries and keys.
FAMILIES: Mapping[str, tuple[bool, bool]] = {
    "qwen2": (True, False),
    "qwen3": (False, True),
    "llama": (False, False),
    "mistral": (False, False),
}
VARIANT = re.compile(r"-(instruct|base|chat|it|hf|sft|thinking|v0\.\d|2507)$")
KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A decoder with grouped-query attention and a gated MLP."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool  # input and output embeddings are one tensor
    qkv_bias: bool
    out_bias: bool  # of the attention's output
    mlp_bias: bool
    qk_norm: bool
    positions: int | None  # the longest sequence it was made for

    @property
    def query(self) -> int:
        """Width of queries (and of attention's output)."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Width of keys, and of values."""
        return self.kv_heads * self.head_dim

    @property
    def embedding(self) -> int:
        """Parameters of one embedding."""
        return self.vocabulary * self.hidden

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer."""
        matrices = 2 * self.hidden * (self.query + self.key) + 3 * self.hidden * self.intermediate
        biases = self.qkv_bias * (self.query + 2 * self.key) + self.out_bias * self.hidden
        biases += self.mlp_bias * (2 * self.intermediate + self.hidden)
        return matrices + biases + 2 * self.hidden + self.qk_norm * 2 * self.head_dim

    @property
    def parameters(self) -> int:
        """Parameters of the causal language model; a tied embedding counts once."""
        return self.layers * self.layer_parameters + self.hidden + self.embedding * (1 if self.tied else 2)

    @property
    def value_parameters(self) -> int:
        """Parameters of the same backbone with one number per token instead of an output layer."""
        return self.layers * self.layer_parameters + self.hidden + self.embedding + self.hidden + 1

    @property
    def matrix_parameters(self) -> int:
        """Parameters that take part in a multiplication per token: the layers and the output layer."""
        matrices = 2 * self.hidden * (self.query + self.key) + 3 * self.hidden * self.intermediate
        return self.layers * matrices + self.embedding

    def kv_bytes(self, itemsize: int) -> int:
        """Keys and values of one token.

        >>> shapes()["qwen2.5-7b"].kv_bytes(2)  # 2 * 28 layers * 4 heads * 128 numbers * 2 bytes
        57344
        """
        return 2 * self.layers * self.key * itemsize


def from_config(name: str, config: Mapping[str, Any]) -> Shape:
    """The shape that a config.json says.

    Raises:
        ConfigError: a family whose sizes are not known here, or keys missing.
    """
    family = str(config.get("model_type"))
    if family not in FAMILIES:
        raise ConfigError(
            f"the model {name!r} is of type {family!r}, whose memory is not modelled (only {', '.join(FAMILIES)} are); name a "
            "shape of about its size with --shape"
        )
    if missing := [key for key in KEYS if not isinstance(config.get(key), int)]:
        raise ConfigError(f"the config.json of {name!r} has no {', '.join(missing)}; it describes no such decoder")
    bias, norm = FAMILIES[family]
    attention_bias = bool(config.get("attention_bias", False))
    heads = int(config["num_attention_heads"])
    return Shape(
        name=name,
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or (128 if family == "qwen3" else config["hidden_size"] // heads),
        intermediate=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=bias or attention_bias,
        out_bias=attention_bias and not bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=norm,
        positions=config.get("max_position_embeddings"),
    )


@functools.cache
def _table() -> tuple[dict[str, Shape], dict[str, str]]:
    """Shapes by name, and the name for every alias in lower case."""
    found: dict[str, Shape] = {}
    aliases: dict[str, str] = {}
    for file in sorted((cluster_dir() / "shapes").glob("*.yaml")):
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        for name, row in content["models"].items():
            found[name] = from_config(name, {"model_type": content["model_type"], **row})
            for alias in (name, *row["names"]):
                aliases[alias.lower()] = name
    return found, aliases


def shapes() -> Mapping[str, Shape]:
    """All shapes that ship, by name."""
    return _table()[0]


def shape_named(name: str) -> Shape:
    """A shape by its own name or a hub name.

    >>> shape_named("PRIME-RL/Eurus-2-7B-SFT").name, shape_named("models/Qwen2.5-0.5B-Instruct").name
    ('qwen2.5-math-7b', 'qwen2.5-0.5b')

    Raises:
        ConfigError: there is none of that name; with the nearest, and all that are known.
    """
    known, aliases = _table()
    word = name.rstrip("/").rpartition("/")[2].lower()
    while word not in aliases and VARIANT.search(word):
        word = VARIANT.sub("", word)
    if word in aliases:
        return known[aliases[word]]
    near = difflib.get_close_matches(word, [*known, *aliases], n=1)
    raise ConfigError(
        f"the shape of the model {name!r} is not known: it is no folder with a config.json on this machine"
        + (f", and the nearest name is {near[0]!r}" if near else "")
        + f". Choose one with --shape NAME (for one model of several: --shape KEY=NAME); there are: {', '.join(known)}"
    )


def shape_of(path: str, chosen: str | None) -> Shape:
    """The shape of a run's model: ``chosen`` by the user; else its config.json; else by the last part of its path.

    Raises:
        ConfigError: nothing says what it is.
    """
    if chosen is not None:
        return shape_named(chosen)
    file = Path(path) / "config.json"
    if not file.is_file():
        return shape_named(path)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); expected the JSON file of a Hugging Face model") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{file} holds a {type(config).__name__}; expected the JSON object of a Hugging Face model")
    return from_config(path, config)
