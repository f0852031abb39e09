"""What every process source and every verifier must do, tried without a model, an engine or a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from rlprm.batch import jagged
from rlprm.contract.checks import close
from rlprm.core.reduce import Identity
from rlprm.errors import ConfigError
from rlprm.records import Stream
from rlprm.roles import Prompt, Rollout, RowText, Verdict, Verified
from rlprm.sources.base import OWN, ProcessSource, Scorable, SourceContext

QUESTION, GOLD = "what is 3+4?", "7"
# (response, its steps): an empty one, one step, several, and a text that says nothing.
RESPONSES = (
    ("", ()),
    ("7", ("7",)),
    ("3+4=7\nso 7", ("3+4=7\n", "so 7")),
    ("```python\nprint(7)\n```\n8", ("```python\nprint(7)\n```\n", "8")),
)
LENGTHS = (1, 2, 6, 5)  # tokens of each response
TRICKS = ("", " ", "\n\n", "7 or 8", "\\boxed{}", "the answer is", "\x00", "7" * 5000)


class NotWithoutModel(Exception):
    """The source asks for a model, an engine or the policy, so nothing can be tried here."""


def check_source(kind: type[ProcessSource], *, model: str | None, settings: Mapping[str, Any], made: Any) -> None:
    """Rewards only on response tokens, finite, the same when asked again, and nothing made up for an empty batch.

    ``settings`` as the YAML has them, ``made`` the same with nested parts made.

    Raises:
        NotWithoutModel: with what it asks for.
    """
    assert issubclass(kind, ProcessSource), f"{kind} is no subclass of rlprm.sources.base.ProcessSource"
    assert kind.granularity(**settings) in ("token", "step", "whole")
    kind.check(model=model, learner=False, **settings)
    wants = [what for what, asked in (("a model", model), ("the policy", kind.reads_policy)) if asked]
    wants += [f"an engine ({kind.engine})"] if kind.engine != "none" else []
    if wants:
        raise NotWithoutModel(f"it asks for {' and '.join(wants)}")
    source = kind(context(), **made)
    given = scorable()
    before = given.shard.tokens.clone()
    first, second = source.score(given), source.score(given)
    padded = given.padded
    assert set(first.streams) == {OWN, *kind.outputs}, f"streams {sorted(first.streams)}; promised {kind.outputs}"
    for name, stream in first.streams.items():
        check_stream(stream, padded.response_mask)
        close(second.streams[name].rewards, stream.rewards)
        assert torch.equal(second.streams[name].present, stream.present), "asked twice, it says another thing"
    assert torch.equal(given.shard.tokens, before), "the shard was edited in place"
    source.learn(given)
    source.close()


def check_stream(stream: Stream, response_mask: torch.Tensor) -> None:
    """A stream's shape, where it may say something, and that what it says is a number."""
    assert stream.rewards.shape == stream.present.shape == response_mask.shape
    assert stream.present.dtype == torch.bool
    assert not stream.rewards.requires_grad, "rewards must be detached"
    assert torch.all(response_mask[stream.present]), "a reward off the response"
    assert bool(stream.rewards[stream.present].isfinite().all()), "a present reward is not finite"


def context() -> SourceContext:
    """A place for a source that asks for nothing."""
    return SourceContext(
        name="process",
        model=None,
        learner=None,
        passes=None,
        tokenizer=None,
        policy_tokenizer=None,
        temperature=1.0,
        reduce=Identity(),
        device="cpu",
        dtype="float32",
        attention="sdpa",
        token_budget=1024,
        layout="padded",
        seed=0,
        max_response_tokens=max(LENGTHS),
    )


def scorable() -> Scorable:
    """Four responses to one prompt, two of them right, with texts, log-probs and exact labels."""
    prompt = Prompt(id="a/0", text=QUESTION, question=QUESTION, tokens=(1, 2), gold=GOLD, source="a")
    items, steps = [], []
    for sample, ((text, parts), length) in enumerate(zip(RESPONSES, LENGTHS, strict=True)):
        rollout = Rollout(
            prompt=prompt,
            sample=sample,
            tokens=tuple(range(3, 3 + length)),
            logprobs=(-0.5,) * length,
            finish="stop",
            version=0,
            seed=sample,
        )
        verdict = Verdict(outcome=float(sample in (1, 2)), reason="", seconds=0.0, steps=(1, 0)[: max(len(parts), 1)])
        items.append(Verified(rollout=rollout, text=text, verdict=verdict))
        steps.append([min(token * max(len(parts), 1) // length, max(len(parts), 1) - 1) for token in range(length)])
    everybody = [True] * len(items)
    shard = jagged(items, steps, groups=[0] * len(items), rows=range(len(items)), fresh=everybody, train=everybody)
    logprobs = -0.5 * torch.ones(len(shard.tokens))
    texts = tuple(RowText(prompt=prompt, response=text, steps=parts or ("",)) for text, parts in RESPONSES)
    return Scorable(shard=shard, old=logprobs, ref=logprobs * 1.5, texts=texts, step=1)


def check_verifier(verify: Callable[..., Any], *, gold: str) -> None:
    """An outcome in [0, 1] or a named failure for anything a model may write; nothing is paid for saying nothing."""
    failures = []
    for response in TRICKS:
        try:
            answer = verify(gold, response, QUESTION)
        except ConfigError:
            raise
        except Exception as error:  # noqa: BLE001 - it runs in a process of its own, where a failure is no verdict
            failures.append(f"{type(error).__name__}: {error}")
            continue
        outcome = answer.outcome if isinstance(answer, Verdict) else answer[0]
        assert outcome is None or 0.0 <= outcome <= 1.0, f"{response[:20]!r} earned {outcome}"
        assert response.strip() or not outcome, f"an empty answer ({response!r}) earned {outcome}"
        again = verify(gold, response, QUESTION)
        assert again == answer or isinstance(answer, Verdict), "asked twice, it says another thing"
    assert len(failures) < len(TRICKS), f"it judged none of {len(TRICKS)} texts for the gold {gold!r} ({failures[0]})"
