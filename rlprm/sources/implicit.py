"""The implicit PRM (PRIME, arXiv:2502.01456): process rewards from log-ratios, learnt online from outcomes alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlprm.batch import flat_response_mask, pad, unflatten
from rlprm.core.implicit import (
    Granularity,
    LastToken,
    drop_last,
    implicit_rewards,
    implicit_stream,
    sequence_sums,
    steps_of,
)
from rlprm.core.metrics import Mean, Metric, Sum
from rlprm.core.prm_losses import PrmLoss, Share, State, check_loss, slopes
from rlprm.engine.batching import micros, mini_batches
from rlprm.engine.combine import Measured, agreed, combined
from rlprm.engine.distributed import rank
from rlprm.engine.learner import Outputs
from rlprm.engine.model import load_causal
from rlprm.engine.scoring import Frozen
from rlprm.errors import AlignmentError, CheckpointError, ConfigError
from rlprm.parts import made
from rlprm.records import JaggedShard, MicroBatch, Stream
from rlprm.sources.base import OWN, ProcessSource, Scorable, Scores, SourceContext
from rlprm.sources.measure import measure

ReferenceKind = Literal["initial", "policy"]
Update = Literal["after", "before", "never"]
Pooling = Literal["sum", "step_mean"]

STATE = "loss.json"  # in the source's checkpoint: what its loss carries from step to step
_PER_TOKEN = ("tokens", "rollout_logprobs", "step_index", "step_label")


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """Log-probs of a batch, and the PRM's optimizer steps at which they held."""

    steps: int
    tokens: Int[Tensor, " N"]
    logprobs: Float[Tensor, " N"]


class ImplicitPrm(ProcessSource):
    """``r_t = beta * (log pi_phi - log pi_ref)``; a loss on ``r(y) = sum_t r_t`` and the outcome trains pi_phi.

    ``reference`` initial: the frozen initial model; policy: the policy that is about to be updated (log pi_old).
    ``update`` after: all micro-batches are scored, then all are learnt from, so that no response is scored by a
    half-updated PRM (PRIME's code scores later mini-batches with an already updated one); before: learns first and
    scores with what it has learnt, while its quality is still measured before, on responses it has never seen; never:
    a frozen PRM. ``pooling`` says what ``r(y)`` is in the loss: the sum, or (iStar's code) the mean over steps of their
    sums. ``last_token`` drop: the response's last token is paid 0, though it is learnt from (verl's PRIME recipe).
    """

    reads_reference: ClassVar[bool] = True  # surprisal, which every PRM is shown beside, needs the initial model
    measures: ClassVar[bool] = True
    stateful: ClassVar[bool] = True
    exportable: ClassVar[bool] = True

    def __init__(
        self,
        context: SourceContext,
        *,
        beta: float,
        reference: ReferenceKind,
        granularity: Granularity,
        last_token: LastToken,
        update: Update,
        loss: PrmLoss | None,
        pooling: Pooling | None,
    ) -> None:
        self.name = context.name
        self._context = context
        self._scorer = context.learner if update != "never" else _frozen(context)
        self._beta = beta
        self._reference = reference
        self._granularity = granularity
        self._last_token: LastToken = last_token
        self._update = update
        self._loss = loss
        self._pooling = pooling
        self._state: State = {}
        self._seen: Seen | None = None
        self._learned = agreed()

    @classmethod
    def check(cls, *, model: str | None, learner: bool, **settings: Any) -> None:
        """Refuse a PRM without model, a learner that would never learn, and a loss that contradicts itself.

        Raises:
            ConfigError: with the setting, what was found and what to do.
        """
        if model is None:
            raise ConfigError("the implicit PRM has no model; set model to a folder, such as ${model.path}")
        if not settings["beta"] > 0:
            raise ConfigError(
                f"kind.beta is {settings['beta']}; expected more than 0 (0 pays nothing, a negative one pays for being wrong)"
            )
        if settings["last_token"] == "drop" and settings["granularity"] != "token":
            raise ConfigError(
                f"kind.last_token is drop with granularity {settings['granularity']}, whose reward sits on that token; use "
                "granularity token, or last_token keep"
            )
        unused = [key for key in ("loss", "pooling") if settings[key] is not None]
        if settings["update"] == "never":
            if learner:
                raise ConfigError(
                    "kind.update is never and there is a learner, whose gradients and optimizer state nobody would use; set "
                    "learner to null (source=implicit_frozen does)"
                )
            if unused:
                raise ConfigError(
                    f"kind.{unused[0]} is set and kind.update is never, so nobody reads it; set it to null"
                )
            return
        if not learner:
            raise ConfigError(
                f"kind.update is {settings['update']} and learner is null; give it a learner, or set kind.update to never "
                "(source=implicit_frozen)"
            )
        if len(unused) < 2:
            raise ConfigError(
                f"kind.loss is {settings['loss']} and kind.pooling {settings['pooling']}; a PRM that learns needs both"
            )
        loss = settings["loss"]
        check_loss(made(loss) if isinstance(loss, Mapping) else loss)

    @classmethod
    def granularity(cls, **settings: Any) -> Granularity:
        """As the setting says."""
        found: Granularity = settings["granularity"]
        return found

    def score(self, given: Scorable) -> Scores:
        """Rewards, and this rank's measurements of fresh rollouts (before any update)."""
        shard = given.shard
        logprobs = self._logprobs(shard)
        padded = pad(shard)
        measured = measure(
            shard,
            implicit_rewards(
                unflatten(logprobs, shard.lengths),
                unflatten(self._base(given), shard.lengths),
                padded.response_mask,
                self._beta,
            ),
            padded.response_mask,
            unflatten(_required(given.ref), shard.lengths),
            pooling="sum",
            scale="logit",
        )
        if self._update == "before":
            self._learned = self._learn(given)
            return self._scores(given, self._logprobs(shard), measured)
        return self._scores(given, logprobs, measured)

    def learn(self, given: Scorable) -> Measured:
        """One pass of the loss over every accepted response that has an outcome (done already under ``before``)."""
        return self._learn(given) if self._update == "after" else self._learned

    def _learn(self, given: Scorable) -> Measured:
        shard, passes, reduce = given.shard, self._context.passes, self._context.reduce
        known = shard.train & shard.outcome_present
        groups = int(reduce.max(torch.where(shard.train, shard.group, -1).max().double())) + 1
        steps: list[tuple[Share, Mapping[str, Any] | None]] = [
            self._step(given, rows)
            for epoch in range(passes.epochs)
            for rows in mini_batches(
                shard.group,
                known,
                num_groups=groups,
                parts=passes.mini_batches,
                seed=(passes.seed * 1_000_003 + self._scorer.steps) * 1_009 + epoch,
            )
        ]
        updates = [update for _, update in steps if update is not None]
        pairs = [share.pairs for share, _ in steps if share.pairs is not None]
        counts = {"prm/updates": float(len(updates))} | ({"prm/pairs": sum(pairs)} if pairs else {})
        return combined(updates, prefix="prm/") | agreed(**counts)

    def _step(self, given: Scorable, rows: Int[Tensor, " b"]) -> tuple[Share, Mapping[str, Any] | None]:
        """One optimizer step; none (and None) where the loss has nothing to compare on any rank."""
        assert self._loss is not None, "the configuration check demands a loss where there is an update"
        shard, context = given.shard, self._context
        pooled, parts = self._pooled(given, rows)
        share, slope = slopes(
            self._loss,
            pooled,
            shard.outcome[rows],
            torch.ones_like(rows, dtype=torch.bool),
            shard.group[rows],
            context.reduce,
            self._state,
        )
        if share.terms == 0:
            return share, None
        # dL/d(response sum): what is left of the loss for a micro-batch to know
        slope_of_row = torch.zeros(len(shard)).index_put((rows,), (slope / parts).float())
        prepared = micros(
            shard,
            rows,
            token_fields={"base": self._base(given)},
            sequence_fields={"slope": slope_of_row, "outcome": shard.outcome},
            token_budget=context.passes.token_budget,
            layout=context.passes.layout,
        )
        update = self._scorer.update(prepared, self._micro_loss, temperature=context.temperature)
        self._state = share.state
        shift = {} if share.shift is None else {"shift": share.shift}
        return share, {**update, "loss": Sum(float(share.loss)), **shift}

    def _pooled(self, given: Scorable, rows: Int[Tensor, " b"]) -> tuple[Tensor, Tensor]:
        """``r(y)`` of these responses as the loss sees it, in float64, and what their sums were divided by."""
        shard = given.shard
        chosen = torch.zeros(len(shard), dtype=torch.bool).index_fill(0, rows, True)
        tokens = chosen.repeat_interleave(shard.lengths)
        some = replace(shard.select(rows), **{name: getattr(shard, name)[tokens] for name in _PER_TOKEN})
        rewards = implicit_rewards(
            self._current(shard, some, tokens).double(),
            self._base(given)[tokens].double(),
            flat_response_mask(some),
            self._beta,
        )
        place = torch.arange(len(some)).repeat_interleave(some.lengths)
        sums = sequence_sums(rewards[None], place[None], len(some))
        steps = steps_of(pad(some).step_index).double() if self._pooling == "step_mean" else torch.ones_like(sums)
        return sums / steps, steps

    def _current(self, shard: JaggedShard, some: JaggedShard, tokens: Tensor) -> Float[Tensor, " N"]:
        """Log-probs of ``some`` by the PRM as it is now: those of scoring where it has not moved since."""
        seen = self._seen
        fits = seen is not None and seen.steps == self._scorer.steps and torch.equal(seen.tokens, shard.tokens)
        # all ranks or none: a forward pass may be collective
        if seen is not None and float(self._context.reduce.max(torch.tensor(0.0 if fits else 1.0))) == 0:
            return seen.logprobs[tokens]
        found: Tensor = self._scorer.logprobs(some, self._context.temperature)
        return found

    def _micro_loss(self, micro: MicroBatch, outputs: Outputs) -> tuple[Tensor, dict[str, Metric]]:
        """``sum_i (dL/dr_i) r_i``: not the loss, but its gradient."""
        assert outputs.logprobs is not None
        mask = micro.response_mask
        rewards = implicit_rewards(outputs.logprobs, micro.token_fields["base"], mask, self._beta)
        sums = sequence_sums(rewards, micro.sequence, micro.num_sequences)
        return (micro.sequence_fields["slope"] * sums).sum(), {
            "label_mean": Mean.of(micro.sequence_fields["outcome"]),
            "log_ratio_abs": Mean.of(sums.detach().abs() / self._beta),
            "kl_to_ref": Mean.of((rewards.detach() / self._beta)[mask]),
        }

    def _logprobs(self, shard: JaggedShard) -> Float[Tensor, " N"]:
        logprobs: Tensor = self._scorer.logprobs(shard, self._context.temperature)
        if self._update != "never":
            self._seen = Seen(steps=self._scorer.steps, tokens=shard.tokens, logprobs=logprobs)
        return logprobs

    def _base(self, given: Scorable) -> Float[Tensor, " N"]:
        return _required(given.ref) if self._reference == "initial" else given.old

    def _scores(self, given: Scorable, logprobs: Float[Tensor, " N"], measured: Any) -> Scores:
        lengths, padded = given.shard.lengths, given.padded
        paid: Stream = implicit_stream(
            unflatten(logprobs, lengths),
            unflatten(self._base(given), lengths),
            padded.response_mask,
            padded.step_index,
            beta=self._beta,
            granularity=self._granularity,
        )
        stream = drop_last(paid, padded.response_mask) if self._last_token == "drop" else paid
        return Scores(streams={OWN: stream}, measurement=measured, metrics=agreed())

    def save(self, folder: str) -> None:
        """The learner's state and the loss's; a frozen PRM has none."""
        if self._update == "never":
            return
        self._scorer.save(folder)
        if rank() == 0:
            (Path(folder) / STATE).write_text(json.dumps(dict(self._state)) + "\n", encoding="utf-8")

    def load(self, folder: str) -> None:
        """Continue from what :meth:`save` wrote.

        Raises:
            CheckpointError: missing or damaged.
        """
        if self._update == "never":
            return
        self._scorer.load(folder)
        self._seen = None
        path = Path(folder) / STATE
        try:
            self._state = {str(name): float(value) for name, value in json.loads(path.read_text("utf-8")).items()}
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{path} cannot be read as the state of the PRM's loss ({error}); resume an older one"
            ) from error

    def export(self, folder: str) -> str:
        """An ordinary Hugging Face folder of the PRM; a frozen one is the folder it came from."""
        if self._update != "never":
            self._scorer.export(folder, self._context.tokenizer.name_or_path)
        elif rank() == 0:
            shutil.copytree(str(self._context.model), folder, dirs_exist_ok=True)
        return folder

    def close(self) -> None:
        if self._update != "never":
            self._scorer.close()


def _frozen(context: SourceContext) -> Frozen:
    """The PRM's model for scoring only: no gradients, no optimizer."""
    return Frozen(
        load_causal(str(context.model), context.dtype, attention=context.attention, gradient_checkpointing=False),
        token_budget=context.token_budget,
        layout=context.layout,
        device=context.device,
    )


def _required(ref: Tensor | None) -> Tensor:
    if ref is None:
        raise AlignmentError("the implicit PRM needs log-probs of the reference and got none; give the run a reference")
    return ref
