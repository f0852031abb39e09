"""Preference optimisation from start to end: stored rollouts, pairs, the learner, a model folder."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from rlprm.config_dpo import DpoConfig
from rlprm.core.preference import Pair, balanced, sampled
from rlprm.data.stored import by_prompt, stored, stored_shard
from rlprm.errors import DataError
from rlprm.parts import made
from rlprm.records import JaggedShard
from rlprm.roles import StoredRollout
from rlprm.run import factories
from rlprm.run.fine_tuning import check_runs, learnt, refuse_full
from rlprm.run.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Pairs of rows of one shard, and of how many prompts they come."""

    shard: JaggedShard
    pairs: tuple[Pair, ...]
    num_prompts: int
    num_without: int  # prompts that gave no pair


def learn_preferences(config: DpoConfig, progress: Progress) -> dict[str, float]:
    """Train on pairs, write the folder `config.output`, and return the last measurements.

    Raises:
        ConfigError: the output folder is not empty, or a run's model has another tokenizer than `config.model`.
        DataError: stored rollouts that cannot be read, or that make no pair.
    """
    refuse_full(config.output)
    check_runs(config.runs, config.model.path)
    with progress.stage("read rollouts"):
        found = paired(stored(config.runs), made(config.preference), limit=config.pairs_per_prompt, seed=config.seed)
    progress.say(
        f"{len(found.pairs)} pairs of {found.num_prompts - found.num_without} prompts; {found.num_without} prompts of "
        f"{found.num_prompts} have none"
    )
    return learnt(
        config,
        partial(factories.preference, config, found.shard, found.pairs),
        name="dpo",
        told="dpo/loss",
        progress=progress,
    )


def paired(
    rollouts: Sequence[StoredRollout],
    preference: Callable[[Sequence[StoredRollout]], Sequence[Pair]],
    *,
    limit: int | None,
    seed: int,
) -> Pairs:
    """The pairs of all prompts, at most ``limit`` of each, as rows of one shard of the responses that are in a pair.

    Raises:
        DataError: no prompt has a pair.
    """
    groups = by_prompt(rollouts)
    rows: list[StoredRollout] = []
    pairs: list[Pair] = []
    without = 0
    for number, group in enumerate(groups):
        chosen = sampled(preference(group), limit, random.Random(f"pairs/{seed}/{number}"))
        without += not chosen
        members = sorted({index for pair in chosen for index in (pair.preferred, pair.other)})
        place = {index: len(rows) + offset for offset, index in enumerate(members)}
        rows += [group[index] for index in members]
        pairs += [replace(pair, preferred=place[pair.preferred], other=place[pair.other]) for pair in chosen]
    if not pairs:
        raise DataError(
            f"no pair in {len(rollouts)} stored rollouts of {len(groups)} prompts: a prompt needs a response to prefer and "
            "one to prefer it to. Let runs store every group (tracker.rollout_groups=null), or choose another preference"
        )
    return Pairs(shard=stored_shard(rows), pairs=tuple(balanced(pairs)), num_prompts=len(groups), num_without=without)
