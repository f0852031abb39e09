"""Self-certainty of the policy as a reward: how far its choices are from blind ones (Shop-R1, arXiv:2507.17842)."""

from __future__ import annotations

from typing import Any, Literal

import torch

from rlprm.batch import unflatten
from rlprm.core.implicit import Granularity
from rlprm.core.self_certainty import self_certainty
from rlprm.core.steps import to_step_ends
from rlprm.errors import AlignmentError
from rlprm.records import Stream
from rlprm.sources.base import ProcessSource, Scorable, Scores, SourceContext


class SelfCertainty(ProcessSource):
    """``s = scale * (1 / (N V)) * sum_t sum_v p log(p V)``, whole at the last token or by its parts on every token.

    From the entropy of pi_old at the run's temperature; see :func:`rlprm.core.self_certainty.self_certainty` for the
    direction and for the 1/V. ``scale`` is a factor, or ``vocabulary``, which takes the 1/V away: s is then the mean
    KL from uniform per token, in nats. The paper scores its rationale only; here it is the whole response, which on
    most tasks is all rationale. It rewards sharp distributions, right or wrong, and entropy falls with it.

    V is the number of entries of the policy's tokenizer; output layers are often padded beyond them, which moves every
    token's KL by the same small constant.
    """

    reads_policy = True

    def __init__(
        self, context: SourceContext, *, scale: float | Literal["vocabulary"], granularity: Literal["token", "whole"]
    ) -> None:
        assert context.policy is not None
        self.name = context.name
        self._policy = context.policy
        self._vocabulary = len(context.policy_tokenizer)
        self._scale = float(self._vocabulary) if scale == "vocabulary" else float(scale)
        self._granularity = granularity

    @classmethod
    def granularity(cls, **settings: Any) -> Granularity:
        return settings["granularity"]

    def score(self, given: Scorable) -> Scores:
        """Collective over the policy's ranks."""
        entropy = self._policy.entropy(given.shard)
        if len(entropy) != len(given.shard.tokens):
            raise AlignmentError(f"{len(entropy)} entropies for {len(given.shard.tokens)} tokens; expected one each")
        padded = given.padded
        mask = padded.response_mask
        certainty = self_certainty(unflatten(entropy, given.shard.lengths), mask, self._vocabulary) * self._scale
        if self._granularity == "token":
            return Scores.of(Stream(rewards=certainty.float(), present=mask))
        rewards, present = to_step_ends(certainty, mask, torch.where(mask, 0, -1))
        return Scores.of(Stream(rewards=rewards.float(), present=present))
