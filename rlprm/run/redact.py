"""Nothing secret leaves in a file, a log line or a tracker's payload."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = "<redacted>"

# "token" is also an ordinary word here: `pad_token`, `last_token` name no secret.
_NOT_SECRET = ("eos", "bos", "pad", "unk", "sep", "cls", "stop", "mask", "per", "end", "start", "first", "last")
_WORD_TOKENS = "".join(f"(?<!{word}[_-])" for word in _NOT_SECRET)
_SECRET_WORDS = (
    r"(?:api[_-]?key|access[_-]?key|private[_-]?key|secret(?:[_-]?key)?|password|passwd|passphrase|credentials?|authorization"
    rf"|{_WORD_TOKENS}token)"
)
# Whole words of a name: `api_key`, `HF_TOKEN`, `wandb-password`; not `max_tokens` and not `token_budget`.
_SECRET_NAME = re.compile(rf"(?:^|[_\-.]){_SECRET_WORDS}$", re.IGNORECASE)
_SECRET_TEXT = [
    # user:password@ in an address; the address itself stays readable
    (re.compile(r"(?<=://)[^/\s@'\"]+@"), HIDDEN + "@"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=\-]{8,}"), HIDDEN),
    (re.compile(r"(?i)\b(login\s+\S+\s+password)\s+\S+"), HIDDEN),
    # keys that say what they are: Hugging Face, OpenAI-like, GitHub, AWS, W&B
    (
        re.compile(r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_\-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|AKIA[A-Z0-9]{12,})"),
        HIDDEN,
    ),
    (re.compile(r"\bwandb_v1_[A-Za-z0-9_]{16,}"), HIDDEN),
    # `api_key: value`, `TOKEN=value` inside a longer text
    (
        re.compile(
            rf"((?:^|[\s\"',;{{&?+])(?:[\w.\-]*[_\-.])?{_SECRET_WORDS}[\"']?\s*[:=][ \t]*)"
            r"(?!null\b|<redacted>)(\"[^\"]*\"|'[^']*'|[^\s\"',;}&]+)",
            re.IGNORECASE | re.MULTILINE,
        ),
        r"\1" + HIDDEN,
    ),
]
# Shorter values would hide ordinary words wherever they occur.
_SHORTEST_VALUE = 8


def is_secret_name(name: str) -> bool:
    """Does a key or variable of this name hold a secret?

    >>> [is_secret_name(name) for name in ("WANDB_API_KEY", "hf_token", "max_tokens", "token_budget", "granularity")]
    [True, True, False, False, False]
    """
    return _SECRET_NAME.search(name) is not None


def redact_text(text: str, environ: Mapping[str, str] | None = None) -> str:
    """``text`` without whatever looks like a secret, and without the value of any secret environment variable.

    >>> redact_text("store: s3://me:hunter2@host/x", {})
    'store: s3://<redacted>@host/x'
    >>> redact_text("note: my key is 0123456789abcdef", {"SOME_API_KEY": "0123456789abcdef"})
    'note: my key is <redacted>'
    """
    for value in _secret_values(os.environ if environ is None else environ):
        text = text.replace(value, HIDDEN)
    for pattern, replacement in _SECRET_TEXT:
        text = pattern.sub(replacement, text)
    return text


def redact(value: Any, environ: Mapping[str, str] | None = None) -> Any:
    """A copy of a nested configuration, safe to write and to send.

    >>> redact({"policy": {"lr": 1e-6, "max_tokens": 64}, "hub": {"api_key": "abc"}}, {})
    {'policy': {'lr': 1e-06, 'max_tokens': 64}, 'hub': {'api_key': '<redacted>'}}
    """
    if isinstance(value, Mapping):
        return {
            key: HIDDEN if is_secret_name(str(key)) and isinstance(inner, str) and inner else redact(inner, environ)
            for key, inner in value.items()
        }
    if isinstance(value, str):
        return redact_text(value, environ)
    if isinstance(value, Sequence):
        return [redact(inner, environ) for inner in value]
    return value


def _secret_values(environ: Mapping[str, str]) -> list[str]:
    values = {value for name, value in environ.items() if is_secret_name(name) and len(value) >= _SHORTEST_VALUE}
    # Longest first: a value that contains another one must not be cut in two.
    return sorted(values, key=len, reverse=True)
