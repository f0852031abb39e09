"""The policy's own log-ratio as process reward: no PRM at all (SPRO, arXiv:2507.01551)."""

from __future__ import annotations

from rlprm.batch import unflatten
from rlprm.core.implicit import implicit_rewards
from rlprm.errors import AlignmentError
from rlprm.records import Stream
from rlprm.sources.base import ProcessSource, Scorable, Scores, SourceContext


class PolicyLogRatio(ProcessSource):
    """``r_t = beta * (log pi_old - log pi_ref)`` on every response token, against the frozen initial model.

    It pays what the policy has come to prefer, so it is 0 in the first step, while policy and reference are one; with
    the policy as its own reference it would be 0 for ever. Its opposite sign is the built-in stream ``kl``, a price.
    Reviewers of SPRO object to reading the current policy as the optimal one.
    """

    reads_reference = True

    def __init__(self, context: SourceContext, *, beta: float) -> None:
        self.name = context.name
        self._beta = beta

    def score(self, given: Scorable) -> Scores:
        """One reward a response token; nothing is measured, because nothing was learnt.

        Raises:
            AlignmentError: the run has no reference.
        """
        if given.ref is None:
            raise AlignmentError(f"stream {self.name!r} needs log-probs of the reference and got none")
        lengths, mask = given.shard.lengths, given.padded.response_mask
        rewards = implicit_rewards(unflatten(given.old, lengths), unflatten(given.ref, lengths), mask, self._beta)
        return Scores.of(Stream(rewards=rewards, present=mask))
