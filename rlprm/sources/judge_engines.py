"""A judge that is a model folder: engines of the run's own sample its replies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlprm.data.templates import Render
from rlprm.errors import ConfigError, DataError
from rlprm.roles import Prompt, Request, Rollout
from rlprm.sources.base import Engines, SourceContext
from rlprm.sources.judge_clients import Asked, Client, preference
from rlprm.sources.judge_prompts import Question, Reply


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnEngines:
    """Generation engines of the source's own ``model``, in the run's own processes."""

    template: Callable[..., Render]  # tokenizer -> (question -> (text, token ids))
    max_prompt_tokens: int  # longer questions are not asked

    def check(self, model: str | None) -> None:
        """Refuse engines without a model.

        Raises:
            ConfigError: no model folder, or no room for a prompt.
        """
        if model is None:
            raise ConfigError(
                "the judge has neither an endpoint nor a model, so nobody would judge; set the source's model to the judge's "
                "folder, or choose client `endpoint` and set its url"
            )
        if self.max_prompt_tokens < 1:
            raise ConfigError(f"max_prompt_tokens is {self.max_prompt_tokens}; expected 1 or more")

    def connect(self, context: SourceContext) -> Client:
        """A client of the engines."""
        assert context.engines is not None, "the run gives engines to a source that has a model of its own"
        return EngineClient(
            context.engines,
            tokenizer=context.tokenizer,
            render=self.template(context.tokenizer),
            max_prompt_tokens=self.max_prompt_tokens,
        )


class EngineClient:
    """Replies sampled by the judge's own engines, and verdict probabilities from their log-probs."""

    def __init__(self, engines: Engines, *, tokenizer: Any, render: Render, max_prompt_tokens: int) -> None:
        self._engines = engines
        self._tokenizer = tokenizer
        self._render = render
        self._max_prompt_tokens = max_prompt_tokens

    def replies(self, asked: Sequence[Asked]) -> list[list[Reply | None]]:
        """All replies; a question that does not fit gets none."""
        prompts = [self._prompt(each.question) for each in asked]
        requests = [
            Request(prompt=prompt, seeds=each.seeds, temperature=each.temperature, max_tokens=each.max_tokens)
            for prompt, each in zip(prompts, asked, strict=True)
            if prompt is not None
        ]
        # All ranks ask, also one that has no question: engines may be shared.
        sampled = iter(self._engines.sample(requests))
        found: list[Sequence[Rollout | None]] = [
            [None] * len(each.seeds) if prompt is None else next(sampled)
            for prompt, each in zip(prompts, asked, strict=True)
        ]
        texts = [[None if rollout is None else self._text(rollout) for rollout in rollouts] for rollouts in found]
        probabilities = self._probabilities(asked, found, texts)
        return [
            [
                None if text is None else Reply(text=text, probability=probabilities.get((index, sample)))
                for sample, text in enumerate(each)
            ]
            for index, each in enumerate(texts)
        ]

    def close(self) -> None:
        """The engines belong to the run, which closes them."""

    def _prompt(self, question: Question) -> Prompt | None:
        try:
            text, tokens = self._render(self._without_special_tokens(question.text))
        except DataError:
            return None
        if len(tokens) > self._max_prompt_tokens:
            return None
        return Prompt(id=question.marker, text=text, question=question.text, tokens=tokens, gold="", source="judge")

    def _without_special_tokens(self, text: str) -> str:
        """No special token of this judge is spelled by what is judged: a space parts it, as :func:`quoted` does."""
        for token in self._tokenizer.all_special_tokens:
            text = text.replace(token, f"{token[0]} {token[1:]}") if len(token) > 1 else text
        return text

    def _text(self, rollout: Rollout) -> str:
        if rollout.finish != "stop":
            return ""
        return self._tokenizer.decode(list(rollout.tokens), skip_special_tokens=True)

    def _probabilities(
        self,
        asked: Sequence[Asked],
        found: Sequence[Sequence[Rollout | None]],
        texts: Sequence[Sequence[str | None]],
    ) -> dict[tuple[int, int], float]:
        """``P(first) / (P(first) + P(second))`` where a reply has a verdict, from both words after the same prefix."""
        keys, rows = [], []
        for index, each in enumerate(asked):
            for sample, (rollout, text) in enumerate(zip(found[index], texts[index], strict=True)):
                pair = None if rollout is None or text is None else self._both(each.question, rollout, text)
                if pair is not None:
                    keys.append((index, sample))
                    rows += pair
        scored = self._engines.logprobs(rows, 1.0) if any(each.question.words for each in asked) else []
        last = [row[-1] for row in scored]
        return {key: preference(last[2 * at], last[2 * at + 1]) for at, key in enumerate(keys)}

    def _both(self, question: Question, rollout: Rollout, text: str) -> tuple[list[int], list[int]] | None:
        """Prompt and reply up to the verdict's token, once with either word's token; None: it is not one token."""
        span = None if question.words is None else question.form.span(question.marker, text)
        if span is None or question.words is None:
            return None
        position = self._token_at(rollout.tokens, span[0])
        piece = self._tokenizer.decode([rollout.tokens[position]], skip_special_tokens=True)
        said = text[slice(*span)]
        if piece.strip() != said:
            return None
        prefix = [*rollout.prompt.tokens, *rollout.tokens[:position]]
        candidates = [
            self._tokenizer(piece.replace(said, _cased_as(word, said)), add_special_tokens=False)["input_ids"]
            for word in question.words
        ]
        if any(len(ids) != 1 for ids in candidates):
            return None
        first, second = ([*prefix, *ids] for ids in candidates)
        return first, second

    def _token_at(self, tokens: Sequence[int], character: int) -> int:
        """The token that holds a character of the decoded reply."""
        low, high = 0, len(tokens) - 1
        while low < high:
            middle = (low + high) // 2
            if len(self._tokenizer.decode(list(tokens[: middle + 1]), skip_special_tokens=True)) > character:
                high = middle
            else:
                low = middle + 1
        return low


def _cased_as(word: str, example: str) -> str:
    if example.isupper():
        return word.upper()
    return word.capitalize() if example[:1].isupper() else word
