"""How each family of process reward models wants to read a solution, and at which token its number for a step stands.

A format is made with the settings of ``conf/prm_format/*.yaml`` and the PRM's own tokenizer. It says which ``head`` turns
hidden states into numbers, and ``read(question, steps)`` gives token ids and, for each step, the position whose hidden
state the head reads. Nothing behind that position is seen by a causal model, so steps that follow change nothing.

Steps are policy text. What they must not hold are the model's control tokens (an end of turn, the separator's own token
where it is a special one): with them a response could write its own verdicts. Such a reading is marked ``forged``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from rlprm.errors import ConfigError

# classifier: a linear layer or MLP over hidden states, one or two labels; value: one linear layer named v_head;
# vocabulary: the language model's own logits of two tokens
Head = Literal["classifier", "value", "vocabulary"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Token ids of a solution, the position of each step's number, and whether policy text holds control tokens."""

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    forged: bool


@runtime_checkable
class Format(Protocol):
    """What a PRM reads, and where its numbers stand."""

    head: Head
    candidates: tuple[int, int] | None  # ids of the bad and the good token, for the vocabulary head

    def read(self, question: str, steps: Sequence[str]) -> Reading:
        """The solution as the PRM reads it."""
        ...


class Separated:
    """The question, then each step and a separator, cut into tokens piece by piece; read at each separator.

    Source: PURE-PRM (arXiv:2504.15275; and what TRL trains: ``{question}``, newline, no BOS, classifier) and
    Skywork-o1-Open-PRM (BOS, ``{question}`` and a newline, newline after each step, value head with a sigmoid). Steps lose
    white space at both ends; PURE drops the blank line at a step's end, Skywork's code cuts at the separator itself.
    """

    candidates = None

    def __init__(
        self, tokenizer: Any, *, prompt: str, separator: str, bos: bool, head: Literal["classifier", "value"]
    ) -> None:
        self.head: Head = head
        self._tokenizer = tokenizer
        self._prompt = _with_question(prompt)
        self._separator = _ids(tokenizer, separator)
        if not self._separator or tokenizer.unk_token_id in self._separator:
            raise _no_token(tokenizer, separator)
        if bos and tokenizer.bos_token_id is None:
            raise ConfigError(
                f"the PRM's format begins with BOS and its tokenizer {tokenizer.name_or_path!r} has none; set bos: false"
            )
        self._start = [tokenizer.bos_token_id] if bos else []
        # a separator of plain text (a newline) may stand in a step; one that is a special token may not
        self._control = _control_ids(tokenizer)

    def read(self, question: str, steps: Sequence[str]) -> Reading:
        """The pieces' tokens end to end; each step's number stands at the last token of its separator."""
        tokens = [*self._start, *_ids(self._tokenizer, self._prompt.replace("{question}", question))]
        positions, forged = [], False
        for step in steps:
            piece = _ids(self._tokenizer, step.strip())
            forged = forged or not self._control.isdisjoint(piece)
            tokens += [*piece, *self._separator]
            positions.append(len(tokens) - 1)
        return Reading(tokens=tuple(tokens), positions=tuple(positions), forged=forged)


class Tagged:
    """One text, a marker in it after each step, cut into tokens as a whole; read at the markers.

    Source: Math-Shepherd (arXiv:2312.08935; marker ``ки``, vocabulary head: softmax over the logits of ``+`` and ``-`` at
    the marker) and Fin-PRM (arXiv:2508.15202; marker ``<extra_0>``, classifier). Fin-PRM's released RL code gives a whole
    response as one step in another text than the head was trained on; here it is the text of its training, step by step.
    Its ``<extra_1>`` closes the final answer behind all steps, where it can change no step's number, so it is left out.
    """

    def __init__(
        self, tokenizer: Any, *, prompt: str, step: str, marker: str, good: str | None, bad: str | None
    ) -> None:
        self._text = _Text(tokenizer)
        self._prompt = _with_question(prompt)
        if "{step}" not in step or step.count(marker) != 1 or step.index(marker) < step.index("{step}"):
            raise ConfigError(
                f"the PRM's format writes a step as {step!r}; expected a text with {{step}} and one {marker!r} behind it"
            )
        self._step = step
        self._marker = marker
        self.candidates, self.head = _candidates(tokenizer, good, bad)
        _check_marker(tokenizer, marker)

    def read(self, question: str, steps: Sequence[str]) -> Reading:
        """The filled-in text; each step's number stands at the token that holds the last character of its marker."""
        text = self._prompt.replace("{question}", question)
        ends, spans = [], []
        before, after = self._step.split("{step}")
        for number, step in enumerate(steps, start=1):
            text += before.replace("{number}", str(number))
            spans.append((len(text), len(text) + len(step.strip())))
            text += step.strip()
            ends.append(len(text) + after.index(self._marker) + len(self._marker))
            text += after
        return self._text.read(text, ends, spans, special=True)


class Conversation:
    """A chat whose last turn is the solution with a separator token after each step; read at the separators.

    Source: Qwen2.5-Math-PRM (arXiv:2501.07301; system prompt, ``<extra_0>``, two classes) and ReasonFlux-PRM
    (arXiv:2506.18896; the same without a system prompt). ReasonFlux's released RL code joins no steps: it gives the whole
    response as one and pays one number at the last token.
    """

    head: Head = "classifier"
    candidates = None

    def __init__(self, tokenizer: Any, *, system: str | None, separator: str) -> None:
        self._text = _Text(tokenizer)
        self._tokenizer = tokenizer
        self._system = system
        self._separator = separator
        _check_marker(tokenizer, separator)
        _check_chat(tokenizer)

    def read(self, question: str, steps: Sequence[str]) -> Reading:
        """The rendered chat; each step's number stands at its separator."""
        turns = [] if self._system is None else [{"role": "system", "content": self._system}]
        solution = "".join(f"{step.strip()}{self._separator}" for step in steps)
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": solution}]
        text, [_, (begin, _)] = _rendered(self._tokenizer, turns, [question.strip(), solution])
        ends, spans = [], []
        for step in steps:
            spans.append((begin, begin + len(step.strip())))
            begin = begin + len(step.strip()) + len(self._separator)
            ends.append(begin)
        return self._text.read(text, ends, spans, special=False)


class Turns:
    """A chat of one turn per step, each answered by the good token; read where that answer is predicted.

    Source: RLHFlow's Llama3.1-8B-PRM models (RLHFlow/RLHF-Reward-Modeling, math-rm/prm_evaluate.py): the question stands
    in front of the first step, the number is the softmax over the logits of ``+`` and ``-`` at the token before the answer.
    Earlier answers are always the good one, as there, whatever the PRM thought of those steps.
    """

    head: Head = "vocabulary"

    def __init__(self, tokenizer: Any, *, good: str, bad: str) -> None:
        self._text = _Text(tokenizer)
        self._tokenizer = tokenizer
        self._good = good
        self.candidates, _ = _candidates(tokenizer, good, bad)
        _check_chat(tokenizer)

    def read(self, question: str, steps: Sequence[str]) -> Reading:
        """The rendered chat; each step's number stands at the token before its answer."""
        turns, parts = [], []
        for number, step in enumerate(steps):
            text = f"{question} {step.strip()}" if number == 0 else step.strip()
            turns += [{"role": "user", "content": text}, {"role": "assistant", "content": self._good}]
            parts += [text.strip(), self._good]
        text, places = _rendered(self._tokenizer, turns, parts)
        ends = [end for _, end in places[1::2]]
        policy = [(end - len(step.strip()), end) for step, (_, end) in zip(steps, places[0::2], strict=True)]
        reading = self._text.read(text, ends, policy, special=False)
        return Reading(
            tokens=reading.tokens, positions=tuple(place - 1 for place in reading.positions), forged=reading.forged
        )


class _Text:
    """A text as a whole cut into tokens, and the tokens that hold given characters."""

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.is_fast:
            raise ConfigError(
                f"the PRM's tokenizer {tokenizer.name_or_path!r} is a slow one, which does not say where its tokens lie; "
                "save it as a fast tokenizer (tokenizer.json)"
            )
        self._tokenizer = tokenizer
        self._control = _control_ids(tokenizer)

    def read(self, text: str, ends: Sequence[int], policy: Sequence[tuple[int, int]], *, special: bool) -> Reading:
        """``ends``: one past the last character of each marker; ``policy``: where policy text stands.

        ``special``: add the tokenizer's own BOS or EOS, which a rendered chat has already.
        """
        encoded = self._tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        tokens, offsets = encoded["input_ids"], encoded["offset_mapping"]
        positions, place = [], 0
        for end in ends:
            while not offsets[place][0] < end <= offsets[place][1]:
                place += 1
            # a character of several byte tokens: its last one
            while place + 1 < len(offsets) and offsets[place + 1] == offsets[place]:
                place += 1
            positions.append(place)
        controls = [offsets[index] for index, token in enumerate(tokens) if token in self._control]
        forged = any(begin < there[1] and there[0] < end for there in controls for begin, end in policy)
        return Reading(tokens=tuple(tokens), positions=tuple(positions), forged=forged)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _control_ids(tokenizer: Any) -> set[int]:
    """Tokens that mean something to the model beyond their text."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _with_question(prompt: str) -> str:
    if prompt.count("{question}") != 1:
        raise ConfigError(f"the PRM's prompt is {prompt!r}; expected a text with {{question}} once")
    return prompt


def _candidates(tokenizer: Any, good: str | None, bad: str | None) -> tuple[tuple[int, int] | None, Head]:
    """Ids of the bad and the good token; none for a classifier."""
    if good is None and bad is None:
        return None, "classifier"
    if good is None or bad is None:
        raise ConfigError(f"the PRM's format has good {good!r} and bad {bad!r}; give both tokens, or neither")
    found = []
    for word in (bad, good):
        ids = _ids(tokenizer, word)
        # the last piece: SentencePiece puts a piece of white space in front
        if not ids or ids[-1] == tokenizer.unk_token_id or tokenizer.decode(ids[-1:]).strip() != word.strip():
            raise _no_token(tokenizer, word)
        found.append(ids[-1])
    if found[0] == found[1]:
        raise ConfigError(f"the PRM's good token {good!r} and bad token {bad!r} are one token; give two")
    return (found[0], found[1]), "vocabulary"


def _check_marker(tokenizer: Any, marker: str) -> None:
    ids = _ids(tokenizer, marker)
    if not ids or ids[-1] == tokenizer.unk_token_id or tokenizer.decode(ids[-1:]).strip() != marker.strip():
        raise _no_token(tokenizer, marker)


def _no_token(tokenizer: Any, text: str) -> ConfigError:
    return ConfigError(
        f"the PRM's tokenizer {tokenizer.name_or_path!r} has no token {text!r}, at which its format reads; choose the "
        "format that this model was trained with (prm_format@...=...)"
    )


def _check_chat(tokenizer: Any) -> None:
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"the PRM's tokenizer {tokenizer.name_or_path!r} has no chat template, which its format needs; choose another "
            "format (prm_format@...=...)"
        )


def _rendered(
    tokenizer: Any, turns: Sequence[dict[str, str]], parts: Sequence[str]
) -> tuple[str, list[tuple[int, int]]]:
    """The chat as text, and where each of ``parts`` stands in it, in this order.

    Raises:
        ConfigError: a template that changes what it is given beyond white space at its ends.
    """
    text = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=False)
    places, start = [], 0
    for part in parts:
        begin = text.find(part, start)
        if begin < 0:
            raise ConfigError(
                f"the chat template of {tokenizer.name_or_path!r} does not write {part[:40]!r} as it was given, so its "
                "steps cannot be found again; choose another format (prm_format@...=...)"
            )
        start = begin + len(part)
        places.append((begin, start))
    return text, places
