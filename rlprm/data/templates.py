"""Templates: one function ``question -> (text, token ids)``, tokenised exactly once.

A template bound to a tokenizer is a :data:`Render`. What it returns is what the engine samples from, what the PRM and
the reference score and what evaluation uses, so the number of BOS tokens is decided here and nowhere else (twice a
BOS, or none where the model expects one, shifts every log-prob and raises nothing).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import jinja2

from rlprm.errors import ConfigError, DataError

Render = Callable[[str], tuple[str, tuple[int, ...]]]

PLACEHOLDER = "{question}"
PROBE = "1"  # an innocent question: what it renders to, beside itself, is the template


@runtime_checkable
class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer, beside the ids of its BOS, EOS, unknown and other special tokens."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any: ...

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any: ...

    def get_chat_template(self, chat_template: str | None = None) -> str: ...


def plain(tokenizer: Tokenizer, *, format: str, bos: Literal["auto", "always", "never"]) -> Render:
    """text = format with the question in place of ``{question}``; tokens = [BOS] + tokenizer(text).

    ``bos``: ``auto`` puts one BOS in front where the tokenizer itself does so (Llama yes, Qwen no); ``always`` and
    ``never`` say it outright. No other special token is added: an EOS that some tokenizers append would end the
    prompt before the answer. Braces other than ``{question}`` are ordinary text, so LaTeX needs no escapes.

    Raises:
        ConfigError: a format without exactly one ``{question}``.
        DataError: ``always`` with a tokenizer that has no BOS; a format that brings a second BOS.
    """
    fill = filler(format)
    bos_id = tokenizer.bos_token_id
    if bos == "always" and bos_id is None:
        raise DataError("bos is 'always' but the tokenizer has no BOS token; set bos to 'auto' or 'never'")
    own = token_ids(tokenizer, PROBE, add_special_tokens=True)
    wanted = bos == "always" or (bos == "auto" and bos_id is not None and own[:1] == (bos_id,))
    head = (bos_id,) if wanted else ()

    def render(question: str) -> tuple[str, tuple[int, ...]]:
        text = fill(question)
        return text, head + token_ids(tokenizer, text, add_special_tokens=False)

    return guarded(tokenizer, render)


def chat(
    tokenizer: Tokenizer, *, system: str | None, format: str, jinja: str | None, arguments: Mapping[str, Any]
) -> Render:
    """text = chat template of [system], user(format), then the start of the assistant's turn; tokens = tokenizer(text).

    The template's own BOS counts and the tokenizer adds none. ``jinja`` replaces the tokenizer's template;
    ``arguments`` are handed to it by name (``enable_thinking: false``; a fixed ``date_string`` for those that print
    today's date, or a run cannot be resumed tomorrow).

    Raises:
        ConfigError: a format without exactly one ``{question}``.
        DataError: no template; a template that fails, ignores the system text or never reads an argument, or starts
            with two BOS tokens.
    """
    fill = filler(format)
    try:
        template = tokenizer.get_chat_template(jinja)
    except ValueError as error:
        raise DataError(
            "the tokenizer has no chat template; set jinja to one, use the plain template, or take an instruct model"
            f" ({error})"
        ) from error
    for name in arguments:
        if re.search(rf"\b{re.escape(name)}\b", template) is None:
            raise DataError(f"the chat template never reads the argument {name!r}; remove it or correct its name")
    opening = [] if system is None else [{"role": "system", "content": system}]

    def render(question: str) -> tuple[str, tuple[int, ...]]:
        messages = [*opening, {"role": "user", "content": fill(question)}]
        try:
            text = tokenizer.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=True, tokenize=False, **arguments
            )
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise DataError(
                f"the chat template refuses a {' and a '.join(message['role'] for message in messages)} message: "
                f"{error}; set system to null where a template knows no system role, or set jinja"
            ) from error
        return text, token_ids(tokenizer, text, add_special_tokens=False)

    text, _ = render(PROBE)
    for part, said in (("system", system), ("format", fill(PROBE))):
        if said is not None and said.strip() not in text:
            raise DataError(f"the chat template leaves out the {part} text {said!r:.60}; set another {part} or jinja")
    return guarded(tokenizer, render)


def filler(format: str) -> Callable[[str], str]:
    """question -> format with the question in it, everything else literal.

    >>> filler("{question} Answer in \\\\boxed{}.")("1+1=")
    '1+1= Answer in \\\\boxed{}.'
    """
    if format.count(PLACEHOLDER) != 1:
        raise ConfigError(
            f"format {format!r} has {PLACEHOLDER} {format.count(PLACEHOLDER)} times; expected exactly once"
        )
    before, after = format.split(PLACEHOLDER)
    return lambda question: before + question + after


def token_ids(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
    """The token ids of ``text``; ``verbose`` is off because prompts that are too long are counted by the caller."""
    return tuple(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])


def guarded(tokenizer: Tokenizer, render: Render) -> Render:
    """``render``, with the special tokens of every prompt equal in number to the template's own.

    A question that spells ``<|im_end|>`` or ``<s>`` would end its own turn or bring a second BOS; the unknown token is
    exempt, because a character outside the vocabulary is no structure.
    """
    bos_id = tokenizer.bos_token_id
    # some tokenizers (GPT-2's) use one token as unknown, BOS and EOS: it is structure then
    unknown = {tokenizer.unk_token_id} - {bos_id, tokenizer.eos_token_id}
    special = set(tokenizer.all_special_ids) - unknown
    _, probe = render(PROBE)
    if bos_id is not None and probe[:2] == (bos_id, bos_id):
        raise DataError("the template starts with two BOS tokens; take the one written in the format or template out")
    expected = sum(token in special for token in probe)

    def checked(question: str) -> tuple[str, tuple[int, ...]]:
        text, tokens = render(question)
        found = sum(token in special for token in tokens)
        if found != expected:
            raise DataError(
                f"the prompt has {found} special tokens and its template {expected}: the question spells one of "
                f"them; remove it from {question!r:.80}"
            )
        return text, tokens

    return checked
