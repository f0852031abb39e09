"""The tokenizer of a model folder, and the tokens at which a response ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlprm.errors import ConfigError


def load_tokenizer(path: str) -> Any:
    """The Hugging Face tokenizer beside a model.

    Raises:
        ConfigError: no such folder, or a folder without tokenizer files.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no tokenizer at {path!r} ({str(error).splitlines()[0]}); expected a Hugging Face model folder with tokenizer "
            "files"
        ) from error


def stop_token_ids(path: str, tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends a response: the model's generation config may name more than the tokenizer's one EOS.

    Chat models often end a turn with another token than ``eos_token``; missing it would count every answer as truncated.

    Raises:
        ConfigError: neither names any.
    """
    found: set[int] = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    for name in ("generation_config.json", "config.json"):
        file = Path(path) / name
        if file.is_file():
            ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
            found |= set() if ids is None else {int(token) for token in (ids if isinstance(ids, list) else [ids])}
    if not found:
        raise ConfigError(f"model {path!r} names no EOS token, so no response could ever end; set eos_token_id there")
    return tuple(sorted(found))
