"""Names of what process sources measured; the ranks answer from memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rlprm.actors.group import WorkerGroup
from rlprm.actors.learners import SourcePlace, Sources, TokenValues
from rlprm.batch import Batch
from rlprm.core.metrics import Sum, check_name
from rlprm.engine.combine import Measured
from rlprm.run.recorder import continuations

NONE = TokenValues(shards=(), summaries=())


class Ranks(WorkerGroup):
    """One rank that has sampled ``count`` continuations."""

    def __init__(self, count: float) -> None:
        super().__init__("prm", [], timeout_s=1.0, logs="")
        partial = {"prover/rollouts": Sum(count), "prm/loss": Sum(count), "flow/loss": Sum(count)}
        self._answer = SimpleNamespace(
            seconds=1.0, metrics=Measured(partial=partial, agreed={}), measurement=None, rows={"": {}}
        )

    def shards(self, method: Any, columns: Any, *common: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return (), (self._answer,)

    def get(self, references: Any, what: str) -> Any:
        return references


def scored(**counts: float) -> dict[str, float]:
    places = {name: SourcePlace(group=Ranks(count), reads_text=False) for name, count in counts.items()}
    batch = Batch(step=1, rows=(), shards=(), texts=(), members=(), selected=(), counts={})
    return dict(Sources(places, {}, outputs={}).score(batch, NONE, NONE).metrics)


@pytest.mark.parametrize("counts", [{"process": 6.0}, {"process": 6.0, "other": 2.0}])
def test_no_prover_hides_the_rollouts_of_another(counts: dict[str, float]):
    metrics = scored(**counts)
    assert continuations(metrics) == sum(counts.values())
    for name in metrics:
        check_name(name)


def test_several_sources_share_a_family_by_stream_name():
    assert {"prover/rollouts", "prm/loss"} < set(scored(process=6.0))
    names = set(scored(process=6.0, other=2.0))
    assert {"prover/process/rollouts", "prover/other/rollouts", "prm/process/loss", "prm/other/loss"} < names
    assert not {"prover/rollouts", "prm/loss"} & names
