"""A price of length as a process source: no model, no text."""

from __future__ import annotations

from typing import Any

import torch

from rlprm.core.implicit import Granularity
from rlprm.core.steps import last_of
from rlprm.errors import ConfigError
from rlprm.records import Stream
from rlprm.sources.base import ProcessSource, Scorable, Scores, SourceContext


class Overlong(ProcessSource):
    """``factor * min(0, (free - L) / (max_length - free))`` at a response's last token, at least ``-factor``.

    ``L`` response tokens (EOS included); ``free = (1 - buffer) * max_length`` of them cost nothing, then the price grows
    in a straight line up to ``factor`` at ``max_length``. Source: DAPO's soft overlong punishment (arXiv:2503.14476),
    with 4096 of 20480 tokens as buffer. Differs: the buffer is a share, so that it fits every length limit; and where
    the verifier gave no verdict there is no price either, because summed into an absent outcome it would be a reward.
    """

    def __init__(self, context: SourceContext, *, max_length: int, buffer: float, factor: float) -> None:
        self.name = context.name
        self._max_length = max_length
        self._free = (1 - buffer) * max_length
        self._factor = factor

    @classmethod
    def check(cls, *, model: str | None, learner: bool, **settings: Any) -> None:
        super().check(model=model, learner=learner)
        length, buffer, factor = (settings[key] for key in ("max_length", "buffer", "factor"))
        if not (length >= 1 and 0 < buffer <= 1 and factor > 0):
            raise ConfigError(
                f"overlong has max_length {length}, buffer {buffer} and factor {factor}; expected at least one token, a "
                "share in (0, 1], and a factor above 0 (it is subtracted)"
            )

    @classmethod
    def granularity(cls, **settings: Any) -> Granularity:
        return "whole"

    def score(self, given: Scorable) -> Scores:
        """One entry for each judged response."""
        padded = given.padded
        lengths = padded.response_mask.sum(1).double()
        over = (lengths - self._free) / (self._max_length - self._free)
        price = -self._factor * over.clamp(0, 1)
        last = last_of(padded.response_mask, torch.where(padded.response_mask, 0, -1))
        present = last & padded.outcome_present[:, None]
        rewards = torch.where(present, price[:, None], torch.zeros_like(price[:, None]))
        return Scores.of(Stream(rewards=rewards.to(padded.rollout_logprobs.dtype), present=present))
