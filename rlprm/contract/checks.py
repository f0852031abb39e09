"""What every piece of a group must do. Each function takes the callable, so that anybody's own piece can be checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlprm.batch import Row
from rlprm.contract.ranks import on_ranks
from rlprm.contract.samples import EQUAL, LONE, Sample, in_shards, nothing_present, sample
from rlprm.core.gates import Around
from rlprm.core.groups import known
from rlprm.core.policy_loss import Choices
from rlprm.core.reduce import Identity
from rlprm.core.row_scores import of_steps
from rlprm.core.steps import step_indices, to_step_ends
from rlprm.errors import ConfigError
from rlprm.records import Shard, Stream
from rlprm.roles import Prompt, Rollout, Verdict, Verified

TOLERANCE = 1e-5


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def is_local(normalizer: Callable[..., Any]) -> bool:
    """A normalizer that says of itself that its statistics are its shard's own."""
    return str(getattr(normalizer, "keywords", {}).get("scale", "")).startswith("local_")


# -- normalizers: (rewards, present, shard, reduce) -> rewards -------------------------------------------------------


def check_normalizer(normalizer: Callable[..., Tensor]) -> None:
    def run(given: Sample) -> Tensor:
        return normalizer(given.rewards, given.present, given.shard, Identity())

    given = sample()
    before = given.rewards.clone()
    found = run(given)
    assert found.shape == given.rewards.shape
    assert found.dtype == given.rewards.dtype
    assert torch.equal(given.rewards.nan_to_num(9.0), before.nan_to_num(9.0)), "the rewards were edited in place"
    assert bool(found.isfinite().all()), "not finite: a group of one, a group without spread, or NaN under the mask"
    assert torch.all(found[~given.present] == 0), "a reward appeared where none was"
    for garbage in (0.0, 1e30, torch.nan, torch.inf):
        assert torch.equal(run(given.filled(garbage)), found), f"{garbage} off the stream changed the result"
    assert torch.all(run(nothing_present()) == 0)
    close(run(given.widened(3)), torch.nn.functional.pad(found, (0, 3)))
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(1))
    close(run(given.select(order)), found[order])
    renamed = replace(given, shard=replace(given.shard, group=1000 - 3 * given.shard.group))
    close(run(renamed), found)
    for rows in (EQUAL, [LONE]):
        assert bool(run(given.select(torch.tensor(rows))).isfinite().all())


def sharded(normalizer: Callable[..., Tensor], given: Sample, count: int) -> Tensor:
    """The result of ``count`` ranks, put together again."""
    rows = in_shards(given, count)
    parts = on_ranks(lambda part, reduce: normalizer(part.rewards, part.present, part.shard, reduce), [
        given.select(each) for each in rows
    ])  # fmt: skip
    found = torch.zeros_like(given.rewards)
    for each, part in zip(rows, parts, strict=True):
        found[each] = part
    return found


def check_normalizer_is_global(normalizer: Callable[..., Tensor]) -> None:
    given = sample()
    whole = normalizer(given.rewards, given.present, given.shard, Identity())
    for count in (1, 2, 5):
        close(sharded(normalizer, given, count), whole)


# -- estimators: (rewards, present, shard) -> advantages -------------------------------------------------------------


def check_estimator(estimator: Callable[..., Tensor]) -> None:
    def run(given: Sample) -> Tensor:
        return estimator(given.rewards, given.present, given.shard)

    given = fitting(estimator)
    found = run(given)
    assert found.shape == given.rewards.shape
    assert found.dtype == given.rewards.dtype
    assert bool(found.isfinite().all())
    assert torch.all(found[~given.shard.response_mask] == 0), "credit off the response"
    for garbage in (0.0, 1e30, torch.nan):
        assert torch.equal(run(given.filled(garbage)), found)
    assert torch.all(run(nothing_present()) == 0)
    close(run(given.widened(2)), torch.nn.functional.pad(found, (0, 2)))
    assert bool(found.abs().sum() > 0)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(4))
    close(run(given.select(order)), found[order])
    for group in given.shard.group.unique():  # a group knows nothing of the others
        rows = (given.shard.group == group).nonzero()[:, 0]
        close(run(given.select(rows)), found[rows])
    if "baseline" in getattr(estimator, "keywords", {}):
        return  # it compares the group's responses and weighs rewards against each other, and says so
    for row in range(len(found)):
        alone = run(given.select(torch.tensor([row])))
        close(alone, found[row : row + 1])  # accumulation only: rows know nothing of each other
    close(run(replace(given, rewards=-2.5 * given.rewards)), -2.5 * found)  # linear: no centring, no scaling
    other = replace(given, rewards=given.rewards.roll(1, 0).nan_to_num(0.3))
    close(run(replace(given, rewards=given.rewards + other.rewards)), found + run(other))


def fitting(estimator: Callable[..., Tensor]) -> Sample:
    """Rewards of tokens; of steps where the estimator refuses those in words."""
    given = sample()
    try:
        estimator(given.rewards, given.present, given.shard)
    except ConfigError:
        sums, present = to_step_ends(given.rewards, given.present, given.shard.step_index)
        return replace(given, rewards=torch.where(present, sums, torch.nan), present=present)
    return given


# -- gates: (part, around) -> part -----------------------------------------------------------------------------------


def check_gate(gate: Callable[..., Tensor]) -> None:
    given = sample(complete=True)
    mask = given.shard.response_mask
    part = torch.where(mask, given.rewards, 0.0)
    outcome = torch.where(mask, given.rewards.roll(1, 0).nan_to_num(0.0), 0.0)

    def around(trust: float | None, outcome_part: Tensor | None, order: Tensor | None = None) -> Around:
        rows = torch.arange(len(part)) if order is None else order
        parts = {"process": part[rows]} | ({} if outcome_part is None else {"outcome": outcome_part[rows]})
        streams = {"process": Stream(rewards=given.rewards[rows], present=given.present[rows])}
        return Around(name="process", shard=given.shard.select(rows), parts=parts, streams=streams, trust=trust)

    for trust in (0.0, 0.3, 1.0):
        found = gate(part, around(trust, outcome))
        assert found.shape == part.shape
        assert torch.all(found[~mask] == 0)
        assert torch.all(found * part >= 0), "a gate turned credit around"
        assert torch.all(found.abs() <= part.abs() + 1e-7), "a gate made credit larger"
        order = torch.randperm(len(part), generator=torch.Generator().manual_seed(2))
        close(gate(part[order], around(trust, outcome, order)), found[order])
        assert torch.all(gate(torch.zeros_like(part), around(trust, outcome)) == 0)
    # what a gate needs and does not get is refused in words, never replaced by a guess
    for missing in ((1.0, None), (None, outcome)):
        try:
            found = gate(part, around(*missing))
        except ConfigError:
            continue
        close(found, gate(part, around(1.0, outcome)))


# -- merges: (streams, shard) -> streams -----------------------------------------------------------------------------


def outcome_of(shard: Shard) -> Stream:
    return Stream(rewards=shard.outcome[:, None].expand(shard.tokens.shape).clone(), present=shard.response_mask)


def check_merge(merge: Callable[..., Mapping[str, Stream]]) -> None:
    def streams_of(given: Sample) -> dict[str, Stream]:
        return {
            "outcome": outcome_of(given.shard),
            "process": Stream(rewards=given.rewards, present=given.present),
        }

    given = sample()
    found = merge(streams_of(given), given.shard)
    assert set(found) <= {"outcome", "process"}
    assert found
    for garbage in (0.0, torch.inf):
        other = merge(streams_of(given.filled(garbage)), given.shard)
        for name, stream in found.items():
            assert stream.rewards.shape == stream.present.shape == given.rewards.shape
            assert torch.all(given.shard.response_mask[stream.present]), "a reward off the response"
            assert bool(stream.rewards[stream.present].isfinite().all())
            assert torch.equal(stream.present, other[name].present)
            assert torch.equal(stream.rewards[stream.present], other[name].rewards[stream.present])
    order = torch.randperm(len(given.rewards), generator=torch.Generator().manual_seed(3))
    moved = merge(streams_of(given.select(order)), given.shard.select(order))
    for name, stream in found.items():
        assert torch.equal(moved[name].present, stream.present[order])
        assert torch.equal(moved[name].rewards[moved[name].present], stream.rewards[order][stream.present[order]])
    empty = nothing_present()
    for name, stream in merge(streams_of(empty), empty.shard).items():
        assert name != "process" or not bool(stream.present.any()), "rewards were made up"


# -- splitters: (pieces) -> starts -----------------------------------------------------------------------------------

TEXTS: list[list[str]] = [
    [],
    [""],
    ["  ", "\n", ""],
    ["a"],
    ["Step 1:", " 1+1", "=2\n", "\n", "Step", " 2:", " 2*3=6", "\n\n", "so 6", ""],
    ["\n\n", "a\n", "\nb", "c\n\n\n\n", "\n\n", "d", "\n\n", ""],
    ["x"] * 300,
]


def check_splitter(splitter: Callable[[Sequence[str]], list[int]]) -> None:
    for pieces in TEXTS:
        before = list(pieces)
        starts = splitter(pieces)
        assert pieces == before
        assert starts == splitter(pieces)
        assert all(isinstance(start, int) and 0 <= start <= len(pieces) for start in starts)
        indices = step_indices(pieces, splitter)
        assert len(indices) == len(pieces)
        assert sorted(set(indices)) == list(range(len(set(indices)))), "steps count from 0 without gaps"
        assert indices == sorted(indices), "a later token lies in an earlier step"


# -- keep rules: (group) -> bool; select rules: (rows) -> list[bool] -------------------------------------------------


def verified(outcome: float | None, number: int = 0) -> Verified:
    prompt = Prompt(id="a/0", text="1+1", question="1+1", tokens=(1, 2), gold="2", source="a")
    rollout = Rollout(
        prompt=prompt, sample=number, tokens=(3, 4), logprobs=(-0.1, -0.2), finish="stop", version=0, seed=number
    )
    return Verified(rollout=rollout, text="2", verdict=Verdict(outcome=outcome, reason="", seconds=0.0))


def group_of(*outcomes: float | None) -> list[Verified]:
    return [verified(outcome, number) for number, outcome in enumerate(outcomes)]


def check_keep(rule: Callable[[Sequence[Verified]], bool]) -> None:
    assert rule(group_of(None, None)) is False, "a prompt without any verdict teaches nothing"
    assert rule(group_of()) is False
    assert rule(group_of(1.0, 0.0, 1.0, 0.0)) is True, "no rule drops a prompt that is solved half the time"
    for outcomes in ((1.0, 0.0, None), (0.0, 0.0, 1.0, 0.0), (1.0, 1.0), (0.0,), (0.5, 0.25, None)):
        kept = rule(group_of(*outcomes))
        assert isinstance(kept, bool)
        assert kept is rule(group_of(*reversed(outcomes))), "the order of responses decided"


def row(**changes: Any) -> Row:
    given = dict(
        group=0, prompt_id="a/0", source="a", sample=0, outcome=1.0, reason="", finish="stop", prompt_length=2,
        response_length=4, num_steps=1, version=0, repetition=0.0, copy=False, fresh=True, train=True,
    )  # fmt: skip
    return Row(**{**given, **changes})


def check_select(rule: Callable[..., list[bool]]) -> None:
    rows = [
        row(group=number // 2, sample=number % 2, finish=finish, train=train, outcome=outcome)
        for number, (finish, train, outcome) in enumerate(
            [
                ("stop", True, 1.0),
                ("length", True, 0.0),
                ("stop", False, 1.0),
                ("length", False, None),
                ("stop", True, None),
            ]
        )
    ]
    scores = {"process": {number: of_steps([0.1 * number, -0.2]) for number in range(len(rows))}}
    chosen = rule(rows, scores)
    assert len(chosen) == len(rows)
    assert all(isinstance(each, bool) for each in chosen)
    assert not any(each and not given.train for each, given in zip(chosen, rows, strict=True)), "a refused row trains"
    assert any(chosen)
    turned = {"process": {len(rows) - 1 - number: each for number, each in scores["process"].items()}}
    assert rule(list(reversed(rows)), turned) == list(reversed(chosen)), "the order of rows decided"


# -- surrogates: (choices) -> (loss, indicators) ---------------------------------------------------------------------


def check_surrogate(surrogate: Callable[..., tuple[Tensor, Mapping[str, Tensor]]]) -> None:
    given = sample(complete=True)
    mask = given.shard.response_mask
    rows = torch.arange(len(mask))[:, None]
    old = torch.where(mask, -given.rewards.abs(), torch.nan)
    advantages = torch.where(mask, given.rewards, torch.nan)

    def run(logprobs: Tensor, gain: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        return surrogate(
            Choices(
                logprobs=logprobs,
                old_logprobs=old,
                advantages=gain,
                response_mask=mask,
                sequence=torch.where(given.shard.attention_mask, rows, -1),
                num_sequences=len(mask),
            )
        )

    def gradient(gain: Tensor, shift: float = 0.0) -> Tensor:
        start = (old.nan_to_num(-3.0) + shift).requires_grad_(True)
        run(start, gain)[0].sum().backward()
        assert start.grad is not None
        assert torch.all(start.grad[~mask] == 0), "NaN or credit under the mask"
        return start.grad

    logprobs = old.nan_to_num(-3.0)
    loss, indicators = run(logprobs, advantages)
    assert loss.shape == old.shape
    assert bool(loss.isfinite().all())
    assert torch.all(loss[~mask] == 0)
    for name, values in indicators.items():
        assert values.shape == loss.shape, name
        assert not values.requires_grad, name
        assert bool(values[mask].isfinite().all()), name
    assert torch.all(indicators["ratio"][mask] == 1), "nothing has moved: the policy is pi_old"
    # At pi_old every surrogate is the policy gradient: of each token's own advantage, or, where the ratio is the
    # sequence's, of their mean. Where they are equal within the sequence, these are the same.
    sums = known(advantages, mask).sum(1, keepdim=True)
    mean = torch.where(mask, sums / mask.sum(1, keepdim=True), torch.nan).to(old.dtype)
    close(gradient(mean)[mask], -mean[mask])
    found = gradient(advantages)[mask]
    if not torch.allclose(found, -mean[mask], rtol=TOLERANCE, atol=TOLERANCE):
        close(found, -advantages[mask])
    for shift in (0.05, -0.05, 2.0, -2.0):  # with the advantage, or, where it is clipped, not at all
        assert torch.all(gradient(mean, shift)[mask] * mean[mask] <= 0)
    for far in (80.0, -80.0):
        assert bool(run(logprobs + far, advantages)[0].isfinite().all())
    assert torch.all(run(logprobs - 1.0, torch.zeros_like(loss))[0] == 0)


CHECKS: Mapping[str, Callable[[Any], None]] = {
    "normalizer": check_normalizer,
    "estimator": check_estimator,
    "gate": check_gate,
    "merge": check_merge,
    "splitter": check_splitter,
    "select": check_select,
}
