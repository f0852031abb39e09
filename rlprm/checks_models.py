"""Model folders that a run names: there, complete, and of one vocabulary; found before any model is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlprm.errors import ConfigError

if TYPE_CHECKING:
    from rlprm.config import TrainConfig

STORE_SHARE = 0.9  # of the object store for weights; the rest is for batches on their way


def check_model_folders(config: TrainConfig) -> None:
    """Every model of the run is there, speaks the policy's tokens, and the policy's weights fit the object store.

    Raises:
        ConfigError: see :func:`check_model_folder`; or two models with different vocabularies, or weights larger than
            ``placement.object_store_bytes``.
    """
    from rlprm.run.factories import kind, sources

    check_model_folder("model.path", config.model.path)
    _weights_fit(config)
    others = {
        f"streams.{name}.source.model": stream.source.model
        for name, stream in config.streams.items()
        if stream.source is not None and stream.source.model is not None
    }
    foreign = {f"streams.{name}.source.model" for name, section in sources(config).items() if kind(section).own_tokens}
    if config.critic is not None:
        others["critic.model"] = config.critic.model
    for key, path in others.items():
        check_model_folder(key, path)
        if key not in foreign:
            same_vocabulary(key, path, config.model.path)


def check_model_folder(key: str, path: str) -> None:
    """``path`` is a local folder with a model's configuration and weights; the engines take nothing else.

    Raises:
        ConfigError: with the key of the configuration that names it.
    """
    folder = Path(path)
    if not folder.is_dir():
        todo = "expected a local Hugging Face model folder"
        if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path):
            todo = (
                "give a local folder: rlprm prepare recipe=NAME fetches what a recipe names, and hf download "
                f"{path} --local-dir FOLDER any other model of the hub"
            )
        raise ConfigError(f"{key} {path!r} is no folder (looked for {folder.absolute()}); {todo}")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{key} {path!r} has no config.json; expected a Hugging Face model folder")
    if not any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin")):
        raise ConfigError(f"{key} {path!r} holds no weights (*.safetensors); expected a complete model folder")


def _weights_fit(config: TrainConfig) -> None:
    placement = config.placement
    store = placement.object_store_bytes
    if placement.weight_transport != "object_store" or store is None or placement.ray_address is not None:
        return  # a cluster that is joined has a store of its own size
    weights = sum(file.stat().st_size for file in Path(config.model.path).glob("*.safetensors"))
    if weights > STORE_SHARE * store:
        raise ConfigError(
            f"placement.object_store_bytes is {store} and the weights of model.path {config.model.path!r} have {weights} "
            "bytes, which travel to the engines through it; set placement.object_store_bytes to at least "
            f"{int(weights / STORE_SHARE) + 1} (or null, for Ray to decide), or use another placement.weight_transport"
        )


def same_vocabulary(key: str, path: str, policy: str) -> None:
    """Both models read the same token ids, so they must mean the same by them."""
    own, other = Path(policy), Path(path)
    if own.resolve() == other.resolve():
        return
    files = [folder / "tokenizer.json" for folder in (own, other)]
    if all(file.is_file() for file in files):
        same = files[0].read_bytes() == files[1].read_bytes() or _vocabulary(files[0]) == _vocabulary(files[1])
        found = "their tokenizer.json name different tokens"
    else:
        sizes = [_read(folder / "config.json").get("vocab_size") for folder in (own, other)]
        same = sizes[0] == sizes[1]
        found = f"their config.json have vocab_size {sizes[1]} and {sizes[0]}"
    if not same:
        raise ConfigError(
            f"{key} {path!r} has another tokenizer than model.path {policy!r} ({found}); both read the same token ids, so "
            "use a model of the same family"
        )


def _vocabulary(tokenizer: Path) -> dict[Any, Any]:
    """Text of each token id; how text is cut up does not matter where only ids are exchanged."""
    content = _read(tokenizer)
    try:
        listed = content["model"]["vocab"]
        pairs = (
            {number: text for text, number in listed.items()} if isinstance(listed, dict) else dict(enumerate(listed))
        )
        return pairs | {added["id"]: added["content"] for added in content.get("added_tokens") or ()}
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{tokenizer} has no vocabulary that can be read ({error!r}); save the tokenizer anew"
        ) from error


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); expected the JSON file of a Hugging Face model") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds a {type(content).__name__}; expected the JSON object of a Hugging Face model")
    return content
