"""Merges that set a process stream by the verifier's verdict on the response."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from rlprm.core.groups import group_mean, known
from rlprm.core.merge_parts import named
from rlprm.core.normalize_entries import right
from rlprm.core.steps import last_of, to_step_ends
from rlprm.errors import ConfigError
from rlprm.records import Shard, Stream


def renorm(streams: Mapping[str, Stream], shard: Shard, *, stream: str, mu: float) -> Mapping[str, Stream]:
    """``r + outcome - mu`` before the response's last step; in the last step the outcome speaks alone.

    With rewards in [0, 1] and mu 1, no step of a wrong response is paid and none of a right one is punished. Entries of
    the last step become absent, the outcome stream stays as it is. Where the outcome is absent, so is the reward.

    PPR (arXiv:2509.25598), after the authors' code; mu is a constant there, no statistic, and must match the range of
    the rewards. Their code shifts judgements that could not be parsed, too, and so punishes the policy for its judge;
    here these stay absent.

    Raises:
        ConfigError: no stream of that name.
    """
    shifted = named(streams, stream)
    final = shard.step_index.amax(1, keepdim=True) if shard.step_index.shape[1] else shard.step_index
    present = shifted.present & shard.outcome_present[:, None] & (shard.step_index < final)
    rewards = known(shifted.rewards, present) + known(shard.outcome, shard.outcome_present)[:, None] - mu
    return {**streams, stream: Stream(rewards=known(rewards, present).to(shifted.rewards.dtype), present=present)}


def thought_penalty(
    streams: Mapping[str, Stream], shard: Shard, *, stream: str, alpha: float, right_above: float
) -> Mapping[str, Stream]:
    """``-alpha * (the group's accuracy)`` for each wrong step of a right response; 0 for all other judged steps.

    A step is wrong where its reward (the sum, at its last rewarded token) is not above ``right_above``. The accuracy is
    that of the group's trained responses with a verdict: exploration on easy prompts is punished more. Two of TP-GRPO's
    four cases (arXiv:2507.23317) are made here, beside an outcome part that every token shares: in a right response right
    steps are left at the outcome's advantage and wrong ones fall below it. In a wrong response all entries are a present
    0; that steps which contradict the failure lose the outcome's part is the work of a gate on the outcome. The method
    joins neighbouring steps of one verdict into thoughts; paid per token (estimator ``step_local``) that makes no
    difference. Where the outcome is absent, so is the reward.

    Raises:
        ConfigError: no stream of that name, or an alpha below 0.
    """
    if alpha < 0:
        raise ConfigError(f"alpha is {alpha}; expected at least 0, for a penalty below 0 would pay for wrong steps")
    verdicts = named(streams, stream)
    received = known(verdicts.rewards, verdicts.present)
    spans = torch.where(verdicts.present, shard.step_index, -1)
    sums, _ = to_step_ends(received, verdicts.present, spans)
    present = last_of(verdicts.present, shard.step_index) & shard.outcome_present[:, None]
    solved = right(shard)
    accuracy = group_mean(solved.double(), shard.outcome_present & shard.train, shard.group)
    missed = present & solved[:, None] & (sums <= right_above)
    rewards = known((-alpha * accuracy)[:, None].expand(missed.shape), missed).to(verdicts.rewards.dtype)
    return {**streams, stream: replace(verdicts, rewards=rewards, present=present)}
