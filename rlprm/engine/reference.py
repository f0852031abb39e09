"""pi_ref on one rank: the frozen initial model, whole on every rank, without gradients or optimizer."""

from __future__ import annotations

from torch import Tensor

from rlprm.engine.scoring import Frozen
from rlprm.records import JaggedShard


class Reference:
    """Log-probs of a model that never changes, at the run's one temperature."""

    def __init__(self, frozen: Frozen, *, temperature: float) -> None:
        self._frozen = frozen
        self._temperature = temperature

    def logprobs(self, shard: JaggedShard) -> Tensor:
        """log pi_ref per flat token; 0 on prompt tokens."""
        return self._frozen.logprobs(shard, self._temperature)
