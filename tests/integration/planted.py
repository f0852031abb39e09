"""Process sources that a run must not trust."""

from __future__ import annotations

import torch

from rlprm.records import Stream
from rlprm.sources.base import ProcessSource, Scorable, Scores, SourceContext


class PaysMistakes(ProcessSource):
    """1 for each token of a wrong response: a hack in full swing."""

    def __init__(self, context: SourceContext) -> None:
        self.name = context.name

    def score(self, given: Scorable) -> Scores:
        padded = given.padded
        wrong = padded.response_mask & (padded.outcome < 0.5)[:, None]
        return Scores.of(Stream(rewards=torch.where(wrong, 1.0, 0.0), present=padded.response_mask))
