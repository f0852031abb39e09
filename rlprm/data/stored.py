"""Rollouts that runs have written down (``rollouts.jsonl``), as records to learn from; nothing is tokenised again."""

from __future__ import annotations

import glob
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlprm.batch import jagged
from rlprm.data.datasets import json_records
from rlprm.errors import DataError
from rlprm.records import JaggedShard
from rlprm.roles import Prompt, Rollout, StoredRollout, Verdict, Verified

FILE = "rollouts.jsonl"


class TokenExample(NamedTuple):
    """Prompt and response as token ids, the end of the response included where the model wrote one."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]


def folders(runs: str | Sequence[str]) -> list[str]:
    """One run or several.

    >>> folders("runs/a/seed0")
    ['runs/a/seed0']
    """
    return [runs] if isinstance(runs, str) else list(runs)


def stored(runs: str | Sequence[str]) -> list[StoredRollout]:
    """The rollouts of these run folders, in the order in which they were written.

    A run stores as many as ``tracker.rollout_groups`` says; null stores all.

    Raises:
        DataError: a folder without stored rollouts, or a line that is damaged or was written without token ids.
    """
    found = []
    for run in folders(runs):
        path = Path(run) / FILE
        if not path.is_file():
            raise DataError(f"{path} is missing; expected the folder of a run, such as runs/NAME/seed0")
        rollouts = [_rollout(where, record) for where, record in json_records(glob.escape(str(path)))]
        if not rollouts:
            raise DataError(
                f"{path} is empty; let the run store rollouts with tracker.rollout_groups=null (all of them)"
            )
        found += rollouts
    return found


def by_prompt(rollouts: Sequence[StoredRollout]) -> list[list[StoredRollout]]:
    """The rollouts of each prompt, over steps and runs; prompts are told apart by their tokens, in order of appearance."""
    groups: dict[tuple[int, ...], list[StoredRollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.prompt, []).append(rollout)
    return list(groups.values())


def right_responses(
    *, runs: str | list[str], min_outcome: float, distinct: bool, per_prompt: int | None, truncated: bool, seed: int
) -> list[TokenExample]:
    """Rejection-sampling fine-tuning (RAFT, arXiv:2304.06767; RFT, arXiv:2308.01825): learn from the right responses.

    Those with an outcome of at least ``min_outcome``; ``distinct`` drops copies of a response to the same prompt, and
    ``per_prompt`` keeps at most that many of each prompt, drawn by ``seed``. Responses that the length limit cut have no
    end; unless ``truncated``, they are left out, or the model would learn not to stop.

    Raises:
        DataError: see :func:`stored`; or no response is left.
    """
    rollouts = stored(runs)
    examples: list[TokenExample] = []
    for number, group in enumerate(by_prompt(rollouts)):
        right = [
            TokenExample(each.prompt, each.response)
            for each in group
            if each.response
            and each.outcome is not None
            and each.outcome >= min_outcome
            and (truncated or not each.truncated)
        ]
        if distinct:
            right = list(dict.fromkeys(right))
        if per_prompt is not None and len(right) > per_prompt:
            places = random.Random(f"right/{seed}/{number}").sample(range(len(right)), per_prompt)
            right = [right[place] for place in sorted(places)]
        examples += right
    if not examples:
        raise DataError(
            f"none of the {len(rollouts)} stored rollouts has an outcome of at least {min_outcome:g} and an end; lower "
            "examples.min_outcome, or let runs store more (tracker.rollout_groups=null)"
        )
    return examples


def stored_shard(rollouts: Sequence[StoredRollout]) -> JaggedShard:
    """The rollouts as one shard, row by row; responses to equal prompts are one group."""
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(each.prompt for each in rollouts))}
    return jagged(
        [_verified(row, each) for row, each in enumerate(rollouts)],
        [_step_indices(each) for each in rollouts],
        groups=[numbers[each.prompt] for each in rollouts],
        rows=list(range(len(rollouts))),
        fresh=[False] * len(rollouts),
        train=[True] * len(rollouts),
    )


def _verified(row: int, stored_one: StoredRollout) -> Verified:
    prompt = Prompt(id=stored_one.where, text="", question="", tokens=stored_one.prompt, gold="", source=FILE)
    return Verified(
        rollout=Rollout(
            prompt=prompt,
            sample=row,
            tokens=stored_one.response,
            logprobs=stored_one.logprobs,
            finish="length" if stored_one.truncated else "stop",
            version=stored_one.version,
            seed=0,
        ),
        text="",
        verdict=Verdict(outcome=stored_one.outcome, reason="stored", seconds=0.0, steps=stored_one.labels),
    )


def _step_indices(rollout: StoredRollout) -> list[int]:
    indices = [-1] * len(rollout.response)
    for step, (start, end) in enumerate(rollout.spans):
        indices[start:end] = [step] * (end - start)
    return indices


def _rollout(where: str, record: Mapping[str, Any]) -> StoredRollout:
    if "tokens" not in record:
        raise DataError(
            f"{where} has no token ids (an older rlprm wrote it); run again with tracker.rollout_groups=null"
        )
    try:
        steps, tokens = record["steps"], record["tokens"]
        names = sorted({name for step in steps for name in step["reward"]})
        rollout = StoredRollout(
            where=where,
            step=_whole(record["step"]),
            prompt=tuple(_whole(token) for token in tokens["prompt"]),
            response=tuple(_whole(token) for token in tokens["response"]),
            logprobs=tuple(_finite(value) for value in tokens["logprobs"]),
            outcome=None if record["outcome"] is None else _finite(record["outcome"]),
            truncated=record["truncated"] is True,
            version=_whole(record["version"]),
            spans=tuple((_whole(step["span"][0]), _whole(step["span"][1])) for step in steps),
            labels=tuple(-1 if step["label"] is None else _whole(step["label"]) for step in steps),
            rewards={name: tuple(step["reward"].get(name) for step in steps) for name in names},
        )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise DataError(
            f"{where} is no stored rollout ({type(error).__name__}: {error}); remove the line or restore the file"
        ) from error
    ends = [0, *(place for span in rollout.spans for place in span), len(rollout.response)]
    if ends != sorted(ends) or len(rollout.logprobs) != len(rollout.response) or not rollout.prompt:
        raise DataError(
            f"{where} has {len(rollout.prompt)} prompt tokens, {len(rollout.response)} response tokens, "
            f"{len(rollout.logprobs)} log-probs and the step spans {list(rollout.spans)}, which do not fit together; remove "
            "the line or restore the file"
        )
    return rollout


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"found {value!r:.40}, expected a whole number")
    return value


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"found {value!r:.40}, expected a finite number")
    return float(value)
