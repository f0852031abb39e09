"""A training run that outlives the loss of a process or a node: it starts again from its last checkpoint.

What restarts: a process, its node or the way between them is lost (:class:`WorkerLost`), or weights arrived damaged
(:class:`StaleWeights`). Everything else would happen again, so it ends the run: a configuration, data, no learning signal,
an alarm, numbers that are not finite, a disk that is full, a verifier that fails.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlprm.actors.cluster import cluster
from rlprm.actors.nodes import Failed, Node, nodes, on_each
from rlprm.actors.places import named
from rlprm.cli.compose import Composed
from rlprm.config import TrainConfig, validated
from rlprm.errors import ConfigError, StaleWeights, WorkerLost
from rlprm.placement import check_placement, seats
from rlprm.run import factories
from rlprm.run.checkpoint import complete
from rlprm.run.progress import Progress, duration
from rlprm.run.stopping import Stopping
from rlprm.run.tracker import METRICS
from rlprm.run.training import run_folder, train

STALLED = 3  # restarts in a row that come no further than the run has been before
POLL_S = 2.0
ANSWER_S = 15.0  # for a node to answer; Ray calls a dead one alive for about as long
_LISTS = ("policy_nodes", "prm_nodes", "engine_nodes")


def supervised(config: TrainConfig, composed: Composed, progress: Progress, stopping: Stopping | None = None) -> Path:
    """:func:`rlprm.run.training.train`, and again from the last checkpoint as often as ``recovery.restarts`` allows.

    It waits up to ``recovery.wait_s`` for lost nodes, and then goes on with fewer ranks if ``recovery`` allows that.

    Raises:
        WorkerLost, StaleWeights: no restart is left, three in a row came no further, what is left is too little, or the run
            was to end after this step anyway.
        RlprmError: whatever else ended the run.
    """
    asking = Stopping(progress.say) if stopping is None else stopping
    folder = run_folder(config)
    furthest = last_step(folder) if config.resume == "auto" else -1
    now, shown, lost = config, composed, None
    stalled = 0
    for restart in itertools.count(1):
        try:
            return train(now, shown, progress, lost=lost, stopping=asking)
        except (WorkerLost, StaleWeights) as error:
            reached = last_step(folder)
            stalled = stalled + 1 if lost is not None and reached <= furthest else 0
            furthest = max(furthest, reached)
            if restart > config.recovery.restarts:
                raise
            if asking.asked:
                progress.say("asked to end, so the run is not started again; what was saved last counts")
                raise
            if stalled == STALLED:
                progress.say(f"{STALLED} restarts in a row have not come past step {max(furthest, 0)}: the run ends")
                raise
            lost = str(error)
            progress.say(f"lost: {lost}")
            changed = room(config, composed, progress)
            if changed is None:
                progress.say(
                    "what is left is too little to go on with; recovery.min_policy_ranks, min_prm_ranks and min_engines say "
                    "how little is enough"
                )
                raise
        now, shown = changed_to(composed, changed)
        progress.say(f"restart {restart} of {config.recovery.restarts}: {_goes_on(config, folder, changed)}")
    raise AssertionError("itertools.count has no end")


def last_step(folder: Path) -> int:
    """The last step with metrics in the run folder; -1 where there is none."""
    try:
        lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    except OSError:
        return -1
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except ValueError:
            continue  # a process that dies may leave half a line
    return -1


def room(config: TrainConfig, composed: Composed, progress: Progress) -> dict[str, Any] | None:
    """Which values of the placement must change for a restart, once nodes are back or the wait is over.

    None: nothing that ``recovery`` allows fits. A run with its own Ray loses processes and no nodes, so nothing changes.
    """
    placement = config.placement
    if placement.ray_address is None:
        return {}
    with cluster(
        address=placement.ray_address,
        num_actors=0,
        gpus=0.0,
        object_store_bytes=None,
        working_dir=str(Path(__file__).resolve().parents[2]),
    ):
        deadline = time.monotonic() + config.recovery.wait_s
        told = ""
        while True:
            there = answering()
            if fits(config, composed, there, {}):
                return {}
            left = deadline - time.monotonic()
            if left <= 0:
                return fewer(config, composed, there)
            sentence = (
                f"{len(there)} of {placement.nodes} nodes are there ({', '.join(named(node) for node in there)})"
                if len(there) < placement.nodes
                else "the nodes that are there have no room for all processes"
            )
            if sentence != told:
                progress.say(f"waiting up to {duration(left)} more: {sentence}")
                told = sentence
            time.sleep(min(POLL_S, left))


def answering() -> tuple[Node, ...]:
    """The nodes that do what they are asked, numbered without those that do not."""
    there = nodes()
    if len(there) == 1:
        return there
    answers = on_each(there, lambda: True, timeout_s=ANSWER_S, options={})
    here = [node for node, answer in zip(there, answers, strict=True) if not isinstance(answer, Failed)]
    return tuple(replace(node, index=index) for index, node in enumerate(here))


def fits(config: TrainConfig, composed: Composed, there: Sequence[Node], changed: Mapping[str, Any]) -> bool:
    """Can the run start on these nodes, with these values of its placement changed?"""
    placement = config.placement.model_copy(update=dict(changed))
    if len(there) < placement.nodes:
        return False
    try:
        check_placement(placement)
        seats(placement, there, len(factories.own_engines(config)), prm=factories.on_prm_ranks(config))
        changed_to(composed, changed)  # a batch has as many shards as all roles can share, each with prompts of its own
    except ConfigError:
        return False
    return True


def fewer(config: TrainConfig, composed: Composed, there: Sequence[Node]) -> dict[str, Any] | None:
    """The values of the placement to change so that the run fits these nodes and gives up least; None: nothing fits.

    Lists of nodes keep the numbers that are there, or become null.
    """
    if not there:
        return None
    placement = config.placement
    count = min(placement.nodes, len(there))
    changed: dict[str, Any] = {} if count == placement.nodes else {"nodes": count}
    for key in _LISTS:
        listed = getattr(placement, key)
        kept = [number for number in listed or () if number < count]
        if kept != (listed or []):
            changed[key] = kept or None
    for counts in smaller(config, count):
        dealt = {key: value if value is None else value[: counts[_OF[key]]] for key, value in _lists(config, changed)}
        wanted = {**changed, **counts, **dealt}
        wanted = {key: value for key, value in wanted.items() if value != getattr(placement, key)}
        if fits(config, composed, there, wanted):
            return wanted
    return None


_OF = {"policy_nodes": "policy_ranks", "prm_nodes": "prm_ranks", "engine_nodes": "engines"}


def _lists(config: TrainConfig, changed: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key in _LISTS:
        yield key, changed.get(key, getattr(config.placement, key))


def smaller(config: TrainConfig, count: int) -> Iterator[dict[str, int]]:
    """Numbers of ranks and engines that ``recovery`` allows, those that give up least first.

    Without GPUs nothing tells how much a node holds, so it is given no more ranks than it had: with a part of the nodes,
    that part of the ranks.
    """
    placement, recovery = config.placement, config.recovery
    full = {"policy_ranks": placement.policy_ranks, "prm_ranks": placement.prm_ranks, "engines": placement.engines}
    least = {
        "policy_ranks": recovery.min_policy_ranks,
        "prm_ranks": recovery.min_prm_ranks,
        "engines": recovery.min_engines,
    }
    share = count / placement.nodes
    ranges = []
    for key, most in full.items():
        lowest = most if least[key] is None else min(most, least[key])
        counted = placement.gpus_per_engine if key == "engines" else placement.gpus_per_rank
        highest = most if counted > 0 or share == 1 else max(1, int(most * share))
        ranges.append(range(lowest, highest + 1))

    def given_up(numbers: Sequence[int]) -> tuple[float, float]:
        shares = [1 - number / most for number, most in zip(numbers, full.values(), strict=True)]
        return max(shares), sum(shares)

    for numbers in sorted(itertools.product(*ranges), key=given_up):
        yield dict(zip(full, numbers, strict=True))


def changed_to(composed: Composed, changed: Mapping[str, Any]) -> tuple[TrainConfig, Composed]:
    """The configuration of a restart: it resumes, with these values of the placement."""
    placement = {**composed.values["placement"], **changed}
    values = {**composed.values, "placement": placement, "resume": "auto"}
    origins = {**composed.origins, **{f"placement.{key}": "recovery" for key in changed}, "resume": "recovery"}
    return validated(TrainConfig, values), replace(composed, values=values, origins=origins)


def _goes_on(config: TrainConfig, folder: Path, changed: Mapping[str, Any]) -> str:
    saved = complete(folder / "checkpoints")
    where = f"on from the checkpoint of step {saved[-1][0]}" if saved else "anew, for there is no checkpoint yet"
    values = [f"placement.{key}={value} (of {getattr(config.placement, key)})" for key, value in changed.items()]
    return f"{where}, {'with ' + ', '.join(values) if values else 'with all ranks'}"
