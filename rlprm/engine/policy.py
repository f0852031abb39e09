"""One rank of the policy (and its critic): log-probs, credit, optimizer steps, weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from rlprm.batch import chosen_rows, flat_response_mask, flat_rows, flatten, pad, unflatten
from rlprm.core.credit import StreamPlan, credit, kl_stream, outcome_stream
from rlprm.core.kl import TrustRegion, k1, kl_loss
from rlprm.core.metrics import Max, Mean, Sum
from rlprm.core.mismatch import mismatch_metrics, mismatch_weights
from rlprm.core.moments import Moments
from rlprm.core.policy_loss import Choices, Denominators, aggregation_weights, weighted_sum
from rlprm.core.readable import readable
from rlprm.engine.batching import Passes, micros, mini_batches
from rlprm.engine.combine import Measured, agreed, combined
from rlprm.engine.critic import Critic
from rlprm.engine.distributed import rank
from rlprm.engine.learner import Learner, Outputs
from rlprm.engine.weights import Digest, Group, Manifest, buckets, make_group, recorded, send
from rlprm.errors import CheckpointError
from rlprm.records import JaggedShard, MicroBatch, Shard, Stream
from rlprm.roles import Reduce

MOMENTS = "moments.json"  # in the policy's folder of a checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What the policy minimizes per token, before the token's share of the batch."""

    surrogate: Callable[..., Any]  # (choices) -> (loss, indicators)
    aggregation: str
    horizon: int | None
    kl_weight: float
    kl_kind: str
    entropy_weight: float
    trust: TrustRegion | None
    mismatch_mode: str
    mismatch_cap: float | None
    mismatch_low: float | None


class Policy:
    """pi_theta on one rank. ``version`` counts its optimizer steps; all methods are collective."""

    name = "policy"
    stateful = True
    exportable = True

    def __init__(
        self,
        learner: Learner,
        critic: Critic | None,
        *,
        plans: Sequence[StreamPlan],
        built_in: Sequence[str],
        whiten: str,
        objective: Objective,
        passes: Passes,
        temperature: float,
        reduce: Reduce,
        tokenizer: Any,
        readable_groups: int | None,
    ) -> None:
        self._learner = learner
        self._critic = critic
        self._plans = tuple(plans)
        self._built_in = tuple(built_in)  # `outcome` and `kl`, where the run has them
        self._whiten = whiten
        self._objective = objective
        self._passes = passes
        self._temperature = temperature
        self._reduce = reduce
        self._tokenizer = tokenizer
        self._readable_groups = readable_groups
        self._group: Group | None = None
        self._moments: Mapping[str, Moments] = {}  # of streams with running statistics
        self._first_version = 0  # of the batch under way: before its first update every ratio must be 1

    @property
    def version(self) -> int:
        return self._learner.steps

    def logprobs(self, shard: JaggedShard) -> Tensor:
        """log pi_old per flat token: the trainer's own value before this batch's updates."""
        return self._learner.logprobs(shard, self._temperature)

    def entropy(self, shard: JaggedShard) -> Tensor:
        """Entropy of the choice of each response token, nats."""
        return self._learner.logprobs_and_entropy(shard, self._temperature)[1]

    def credit(
        self,
        shard: JaggedShard,
        selected: Tensor,
        old: Tensor,
        ref: Tensor | None,
        streams: Mapping[str, Mapping[str, Tensor]],
        trust: Mapping[str, float],
        brake: Mapping[str, float],
    ) -> tuple[dict[str, Tensor], Measured, list[dict[str, Any]]]:
        """Flat advantages (and value targets), metrics, and the first rows in readable form."""
        padded = replace(pad(shard), train=selected)
        made = {
            name: Stream(
                rewards=unflatten(fields["rewards"], shard.lengths), present=unflatten(fields["present"], shard.lengths)
            )
            for name, fields in streams.items()
        }
        if "outcome" in self._built_in:
            made["outcome"] = outcome_stream(padded)
        if "kl" in self._built_in:
            assert ref is not None, "the configuration check demands a reference where there is a kl stream"
            made["kl"] = kl_stream(unflatten(old, shard.lengths), unflatten(ref, shard.lengths), padded)
        values = None if self._critic is None else self._critic.learner.values(shard)
        result = credit(
            padded,
            made,
            self._plans,
            self._reduce,
            whiten=self._whiten,
            trust=trust,
            brake=brake,
            moments=self._moments,
            values=None if values is None else unflatten(values, shard.lengths),
            critic=None if self._critic is None else self._critic.plan,
        )
        self._moments = result.moments
        flat = {"advantages": flatten(result.advantages.total, shard.lengths)}
        if values is not None and result.value_targets is not None:
            flat |= {"values": values, "value_targets": flatten(result.value_targets, shard.lengths)}
        gap = mismatch_metrics(
            unflatten(old, shard.lengths),
            padded.rollout_logprobs,
            padded.response_mask,
            unflatten(self._importance(shard, old), shard.lengths),
        )
        metrics = agreed(**result.metrics) | combined([gap], prefix="")
        return flat, metrics, self._read(padded, made, result.advantages)

    def learn(
        self,
        shard: JaggedShard,
        selected: Tensor,
        old: Tensor,
        ref: Tensor | None,
        credit: Mapping[str, Tensor],
        num_groups: int,
    ) -> Measured:
        """All optimizer steps on this batch."""
        measured = agreed()
        if self._critic is not None:
            rows = self._parts(self._critic.passes, shard, selected, num_groups)
            measured |= self._critic.learn(rows, shard, selected, credit, self._reduce)
        self._first_version = first = self._learner.steps
        updates = [
            update
            for rows in self._parts(self._passes, shard, selected, num_groups)
            if (update := self._update(shard, rows, old, ref, credit["advantages"])) is not None
        ]
        count = agreed(**{"actor/updates": float(self._learner.steps - first)})
        return measured | combined(updates, prefix="actor/") | count

    def _parts(self, passes: Passes, shard: JaggedShard, selected: Tensor, num_groups: int) -> list[Tensor]:
        return [
            rows
            for epoch in range(passes.epochs)
            for rows in mini_batches(
                shard.group,
                selected,
                num_groups=num_groups,
                parts=passes.mini_batches,
                seed=(passes.seed * 1_000_003 + self._learner.steps) * 1_009 + epoch,
            )
        ]

    def _update(
        self, shard: JaggedShard, rows: Tensor, old: Tensor, ref: Tensor | None, advantages: Tensor
    ) -> Mapping[str, Any] | None:
        """One optimizer step on ``rows``; None where no rank has a response token."""
        lengths = (shard.lengths - shard.prompt_lengths)[rows]
        denominators = Denominators.count(lengths, self._reduce)
        if denominators.tokens == 0:
            return None
        fields = {
            "importance": self._importance(shard, old),
            "old_logprobs": old,
            "advantages": advantages,
        }
        if self._objective.kl_weight > 0:
            assert ref is not None, "the configuration check demands a reference where there is a KL loss"
            fields["ref_logprobs"] = ref
        moved, factor = self._moved(shard, rows, old, denominators)
        updated = self._learner.update(
            micros(
                shard,
                rows,
                token_fields=fields,
                sequence_fields={},
                token_budget=self._passes.token_budget,
                layout=self._passes.layout,
            ),
            partial(self._loss, denominators, factor),
            temperature=self._temperature,
            entropy=True,
        )
        if self._objective.trust is None:
            return updated
        return {**updated, "trust_region_kl": moved, "trust_region_factor": factor}

    def _moved(self, shard: JaggedShard, rows: Tensor, old: Tensor, denominators: Denominators) -> tuple[float, float]:
        """KL(pi_old || pi) on the step's tokens of all ranks, and the factor that the trust region gives it.

        The factor must be known before the first micro-batch, hence a pass of its own; before the batch's first update
        pi is pi_old and none is needed.
        """
        if self._objective.trust is None or self._learner.steps == self._first_version:
            return 0.0, 0.0
        part = chosen_rows(shard, rows)
        new = self._learner.logprobs(part, self._temperature)
        gap = k1(old[flat_rows(shard.lengths, rows)] - new)[flat_response_mask(part)]
        kl = float(self._reduce.sum(gap.double().sum())) / denominators.tokens
        return kl, self._objective.trust.factor(kl)

    def _importance(self, shard: JaggedShard, old: Tensor) -> Tensor:
        padded = pad(shard)
        weights = mismatch_weights(
            unflatten(old, shard.lengths),
            padded.rollout_logprobs,
            padded.response_mask,
            mode=self._objective.mismatch_mode,
            cap=self._objective.mismatch_cap,
            low=self._objective.mismatch_low,
        )
        return flatten(weights, shard.lengths)

    def _loss(
        self, denominators: Denominators, factor: float, micro: MicroBatch, outputs: Outputs
    ) -> tuple[Tensor, dict[str, Any]]:
        """``sum_t share_t * (importance_t * surrogate_t + kl_weight * kl_t - entropy_weight * H_t)``, and the trust
        region's ``factor * mean_t (log pi_old - log pi)``, a mean over tokens in every aggregation."""
        objective, fields, mask = self._objective, micro.token_fields, micro.response_mask
        assert outputs.logprobs is not None
        assert outputs.entropy is not None
        share = aggregation_weights(
            mask,
            micro.sequence,
            micro.num_sequences,
            mode=objective.aggregation,
            denominators=denominators,
            horizon=objective.horizon,
        )
        choices = Choices(
            logprobs=outputs.logprobs,
            old_logprobs=fields["old_logprobs"],
            advantages=fields["advantages"],
            response_mask=mask,
            sequence=micro.sequence,
            num_sequences=micro.num_sequences,
        )
        surrogate, indicators = objective.surrogate(choices)
        per_token = fields["importance"] * surrogate
        metrics: dict[str, Any] = {
            "pg_loss": Sum(float((share * per_token.detach())[mask].sum())),
            "entropy": Mean.of(outputs.entropy.detach()[mask]),
            "ratio_max": Max.of(indicators["ratio"][mask]),
            **{name: Mean.of(values[mask]) for name, values in indicators.items()},
        }
        if self._learner.steps == self._first_version:
            metrics["ratio_first_diff"] = Max.of((indicators["ratio"][mask] - 1).abs())
        if objective.kl_weight > 0:
            divergence = kl_loss(outputs.logprobs, fields["ref_logprobs"], mask, kind=objective.kl_kind)
            per_token = per_token + objective.kl_weight * divergence
            metrics["kl_loss"] = Sum(float((share * divergence.detach())[mask].sum()))
        if objective.entropy_weight > 0:
            per_token = per_token - objective.entropy_weight * outputs.entropy
        total = weighted_sum(per_token, share)
        if factor > 0:
            own = choices.masked()
            total = total + factor * (own.old_logprobs - own.logprobs).sum() / denominators.tokens
        return total, metrics

    def _read(self, shard: Shard, streams: Mapping[str, Stream], advantages: Any) -> list[dict[str, Any]]:
        if self._readable_groups is None:
            rows = list(range(len(shard)))
        else:  # a look at the first groups that train
            count = self._readable_groups if rank() == 0 else 0
            trained = shard.group[shard.train].unique()[:count]
            rows = [row for row in range(len(shard)) if bool((shard.group[row] == trained).any())]
        return readable(shard, streams, advantages, rows, lambda tokens: self._tokenizer.decode(list(tokens)))

    # -- weights ---------------------------------------------------------------------------------------------------

    def manifest(self) -> Manifest:
        """Names, shapes and dtypes of everything an engine must receive."""
        return Manifest.of(self._learner.named_shapes())

    def pack(self, bucket_bytes: int, put: Callable[[Tensor], Any]) -> tuple[list[Any], str]:
        """All weights in buckets, each handed to ``put``; what it returned, and the digest of the bytes."""
        seen = Digest()
        return [put(bucket) for bucket in buckets(recorded(self._learner.named_weights(), seen), bucket_bytes)], (
            seen.hexdigest()
        )

    def join_transfer(self, host: str, port: int, rank: int, world_size: int, backend: str, timeout_s: float) -> None:
        if self._group is not None:
            self._group.leave()
        self._group = make_group(host, port, rank, world_size, backend, timeout_s)

    def send(self, bucket_bytes: int) -> str:
        """Broadcast all weights to the engines (rank 0); other ranks take part in gathering them."""
        weights = self._learner.named_weights()
        try:
            return "" if self._group is None else send(self._group, weights, bucket_bytes, digest=True)
        finally:
            for _ in weights:
                pass  # under ZeRO-3 gathering is collective: on every rank to the end, also when an engine is lost

    # -- state -----------------------------------------------------------------------------------------------------

    def save(self, folder: str) -> None:
        self._learner.save(folder)
        if rank() == 0:
            saved = {name: moments.to_dict() for name, moments in self._moments.items()}
            (Path(folder) / MOMENTS).write_text(json.dumps(saved), encoding="utf-8")
        if self._critic is not None:
            self._critic.learner.save(f"{folder}_critic")

    def load(self, folder: str) -> None:
        self._learner.load(folder)
        try:
            saved = json.loads((Path(folder) / MOMENTS).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{folder}/{MOMENTS} cannot be read ({error}); the checkpoint is damaged or of another version: resume an "
                "older one, or start anew"
            ) from error
        self._moments = {name: Moments.from_dict(each) for name, each in saved.items()}
        if self._critic is not None:
            self._critic.learner.load(f"{folder}_critic")

    def export(self, folder: str) -> str:
        """An ordinary Hugging Face folder of the policy."""
        self._learner.export(folder, self._tokenizer.name_or_path)
        return folder

    def close(self) -> None:
        if self._group is not None:
            self._group.leave()
        self._learner.close()
        if self._critic is not None:
            self._critic.learner.close()
