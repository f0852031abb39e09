"""One rank of a model that learns under DeepSpeed: log-probs, optimizer steps, weights, checkpoints."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from rlprm.core import metrics
from rlprm.engine import checkpoints, distributed, resharding, scoring
from rlprm.engine.optimizer import LearnerSettings, adamw, deepspeed_config
from rlprm.engine.schedule import learning_rate
from rlprm.engine.scoring import Head, Sequences
from rlprm.errors import AlignmentError, CheckpointError, ConfigError, NonFinite
from rlprm.records import MicroBatch

BUCKET_BYTES = 256 << 20  # gathered at once by named_weights under ZeRO-3

_TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model",
    "chat_template*", "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """What a loss sees of the model, per token of the micro-batch; 0 off the response; gradients flow.

    A causal model has ``logprobs`` (and ``entropy`` where it was asked for), a value model has ``values``.
    """

    logprobs: Float[Tensor, "b t"] | None = None  # nats, at the temperature of the update
    entropy: Float[Tensor, "b t"] | None = None  # nats
    values: Float[Tensor, "b t"] | None = None  # of the state before the token

    @property
    def anchor(self) -> Float[Tensor, ""]:
        """0 with the graph of the whole model: a loss of nothing that still takes part in every collective.

        It reaches every output, whatever the loss of a rank uses: under ZeRO-3 each output that takes part in the
        backward pass gathers weights, and ranks that gather in different orders wait for each other for ever.
        """
        reached = [x for x in (self.logprobs, self.entropy, self.values) if x is not None]
        return 0.0 * sum((torch.where(x.isfinite(), x, 0.0).sum() for x in reached), start=reached[0].new_zeros(()))


# (micro-batch on the learner's device, outputs) -> (loss already divided by its global denominators, typed metrics)
Loss = Callable[[MicroBatch, Outputs], tuple[Tensor, Mapping[str, Any]]]


class Learner:
    """A causal or value model in a DeepSpeed engine (ZeRO 0 to 3). Call :func:`rlprm.engine.distributed.join` first.

    All methods are collective: every rank of the group calls them in the same order. ``steps`` counts the optimizer
    steps taken; a refused step (:class:`NonFinite`) does not count and leaves weights and optimizer as they were.
    """

    def __init__(self, model: nn.Module, settings: LearnerSettings) -> None:
        import deepspeed

        self.settings = settings
        self.steps = 0
        self._head = Head(model)
        self._engine, *_ = deepspeed.initialize(
            model=self._head, optimizer=adamw(self._head, settings), config=deepspeed_config(settings)
        )
        checkpoints.make_loading_safe(self._engine)
        self._hyperparameters = [
            {name: group[name] for name in ("betas", "eps", "weight_decay")}
            for group in self._engine.optimizer.param_groups
        ]

    @property
    def model(self) -> nn.Module:
        """The wrapped Hugging Face model (under ZeRO-3 its parameters are partitioned)."""
        return self._head.model

    def logprobs(self, sequences: Sequences, temperature: float) -> Float[Tensor, " N"]:
        """``log pi(token | what precedes it)`` per flat token at ``temperature``; 0 on prompt tokens; nats, float32."""
        return self._score(sequences, temperature, False)[0]

    def logprobs_and_entropy(
        self, sequences: Sequences, temperature: float
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """:meth:`logprobs`, and the entropy of the distribution that each response token was drawn from."""
        return self._score(sequences, temperature, True)

    def values(self, sequences: Sequences) -> Float[Tensor, " N"]:
        """Value of the state before each flat token; 0 on prompt tokens. For a model of ``load_value`` only."""
        scoring.require_value_model(self._head)
        return self._score(sequences, 1.0, False)[0]

    def _score(self, sequences: Sequences, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
        self._engine.eval()
        return scoring.score(
            self._engine,
            sequences,
            temperature,
            entropy=entropy,
            token_budget=self.settings.token_budget,
            layout=self.settings.layout,
            device=self.settings.device,
            in_step=self.settings.zero_stage == 3,
        )

    def update(
        self, micro_batches: Sequence[MicroBatch], loss: Loss, *, temperature: float = 1.0, entropy: bool = False
    ) -> dict[str, Any]:
        """One optimizer step on the sum over ranks and micro-batches of ``loss``; the split leaves no trace.

        ``loss`` divides by global denominators itself. Ranks may bring different numbers of micro-batches, also none:
        they run empty passes of weight 0, so that collectives always meet. Returned are the metrics of this rank's
        micro-batches, combined, with ``grad_norm`` (before clipping) and ``lr``, which are equal on all ranks.

        Raises:
            NonFinite: a loss or the gradient is NaN or infinite somewhere. Every rank raises alike, nothing moved.
            AlignmentError: no rank has a micro-batch.
        """
        rounds = scoring.largest(len(micro_batches))
        if rounds == 0:
            raise AlignmentError("an optimizer step without a micro-batch on any rank; give at least one sequence")
        faults: list[str] = []
        measured: list[Mapping[str, Any]] = []
        self._engine.train()
        for index in range(rounds):
            mine = index < len(micro_batches)
            micro = scoring.on_device(micro_batches[index] if mine else scoring.nothing(), self.settings.device)
            outputs = self._outputs(micro, temperature, entropy)
            total = outputs.anchor
            if mine:
                value, found = loss(micro, outputs)
                total = total + value
                measured.append(found)
                if not bool(value.isfinite()):
                    faults.append(f"{_culprit(outputs)} in micro-batch {index + 1} of {len(micro_batches)}")
            last = index == rounds - 1
            everywhere = _gather(faults) if last else []
            if everywhere:
                # Bad gradients may sit in DeepSpeed's buffers already. Made NaN as a whole, they take its own way of
                # refusing a step, which empties the buffers, on every rank alike.
                total = total * math.nan
            # DeepSpeed averages gradients over ranks while our denominators are global: the one place that undoes it.
            self._backward(total * distributed.world_size(), last)
            if everywhere:
                self._take_step()
                raise NonFinite(f"optimizer step {self.steps + 1} was not taken: {'; '.join(everywhere)}")
        lr = self._next_lr()
        grad_norm = self._take_step()
        if not math.isfinite(grad_norm):
            raise NonFinite(f"optimizer step {self.steps + 1} was not taken: the gradient norm is {grad_norm}")
        self.steps += 1
        return {**metrics.merged(measured), "grad_norm": grad_norm, "lr": lr}

    def _outputs(self, micro: MicroBatch, temperature: float, entropy: bool) -> Outputs:
        first, second = self._engine(micro, temperature, entropy)
        return Outputs(values=first) if self._head.is_value else Outputs(logprobs=first, entropy=second)

    def _backward(self, total: Tensor, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(total, scale_wrt_gas=False)

    def _next_lr(self) -> float:
        settings = self.settings
        lr = learning_rate(
            self.steps,
            peak=settings.lr,
            kind=settings.schedule,
            warmup=settings.warmup,
            total=settings.total_steps,
        )
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _take_step(self) -> float:
        """Step if the gradient is finite, empty the buffers if it is not; the gradient's norm, which tells which."""
        engine = self._engine
        if self.settings.zero_stage == 0 and self.settings.dtype == "float32":
            # A bare torch optimizer: DeepSpeed neither reports the norm nor refuses a bad gradient.
            gradients = [p.grad for p in self._head.parameters() if p.grad is not None]
            norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients])))
            if math.isfinite(norm):
                engine.step()
            else:
                engine.zero_grad()
            return norm
        engine.step()
        return float("inf") if engine.optimizer.overflow else float(engine.get_global_grad_norm())

    def named_weights(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Name and full tensor of each weight (tied ones once), on the host, on rank 0; nothing on other ranks.

        Under ZeRO-3 the weights are gathered bucket by bucket, so *every* rank must run the iterator to its end. The
        tensors may share memory with the model: use them before the next ``update``.

        Raises:
            ConfigError: a name that the model does not have.
        """
        tensors = _state(self.model)
        if names is not None and (unknown := sorted(set(names) - set(tensors))):
            raise ConfigError(f"the model has no weight {unknown[0]!r} ({len(unknown)} unknown); see named_shapes()")
        wanted = {name: tensor for name, tensor in tensors.items() if names is None or name in names}
        if self.settings.zero_stage < 3:
            if distributed.rank() == 0:
                yield from ((name, tensor.detach().cpu()) for name, tensor in wanted.items())
            return
        from deepspeed.runtime.zero import GatheredParameters

        for bucket in _buckets(wanted):
            with GatheredParameters([t for t in bucket.values() if hasattr(t, "ds_id")]):
                full = {n: t.detach().cpu().clone() for n, t in bucket.items()} if distributed.rank() == 0 else {}
            yield from full.items()

    def named_shapes(self) -> list[tuple[str, Tensor]]:
        """The same names in the same order with meta tensors of the full shape, on every rank; not collective."""
        return [
            (name, torch.empty(getattr(tensor, "ds_shape", tensor.shape), dtype=tensor.dtype, device="meta"))
            for name, tensor in _state(self.model).items()
        ]

    def save(self, folder: str | Path) -> None:
        """Write weights, optimizer, step count and random state; a run that loads them goes on bit by bit the same.

        Every rank writes its own files. Whether the folder counts as a checkpoint is decided by whoever calls this.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._engine.save_checkpoint(str(folder), tag=checkpoints.TAG, save_latest=False)
            checkpoints.save_random_state(folder)
            if distributed.rank() == 0:
                ranks = distributed.world_size()
                checkpoints.write_card(folder, {"steps": self.steps, "world_size": ranks, **self._identity()})
        except OSError as error:
            raise CheckpointError(f"learner state cannot be written to {folder}: {error}; free space there") from error

    def load(self, folder: str | Path) -> None:
        """Continue from what :meth:`save` wrote, on as many ranks bit by bit the same.

        On another number of ranks weights and optimizer are the same to the last bit, and what follows differs by the
        order in which float32 numbers are added. A rank that the checkpoint does not know keeps its own random state.

        Raises:
            CheckpointError: missing or damaged, or written with another ZeRO stage or precision.
        """
        folder = Path(folder)
        card = checkpoints.read_card(folder, self._identity())
        ranks = int(card["world_size"])
        # ZeRO-0 holds everything on every rank, and rank 0 has written it
        if self.settings.zero_stage > 0 and ranks != distributed.world_size():
            resharding.load(self._engine, folder / checkpoints.TAG, ranks)
        else:
            path, _ = self._engine.load_checkpoint(str(folder), tag=checkpoints.TAG)
            if path is None:
                raise CheckpointError(
                    f"{folder} has no state under {checkpoints.TAG}/; it is damaged, resume an older one"
                )
        # DeepSpeed puts back what the optimizer was made with; what it goes on with is this run's configuration
        for group, wanted in zip(self._engine.optimizer.param_groups, self._hyperparameters, strict=True):
            group.update(wanted)
        checkpoints.load_random_state(folder, ranks)
        self.steps = int(card["steps"])

    def _identity(self) -> dict[str, Any]:
        return {"zero_stage": self.settings.zero_stage, "dtype": self.settings.dtype}

    def export(self, folder: str | Path, tokenizer: str | Path) -> None:
        """Write an ordinary Hugging Face folder (safetensors, config, tokenizer files copied from ``tokenizer``).

        transformers and vLLM load it; tied weights are stored once. Collective; rank 0 writes.

        Raises:
            ConfigError: ``tokenizer`` is not a folder with tokenizer files.
        """
        files = sorted({path for pattern in _TOKENIZER_FILES for path in Path(tokenizer).glob(pattern)})
        if not any(path.name.startswith(("tokenizer", "vocab")) or path.suffix == ".model" for path in files):
            raise ConfigError(f"{tokenizer} holds no tokenizer files; give the folder the model was loaded from")
        weights = {name: tensor.clone() for name, tensor in self.named_weights()}
        if distributed.rank() == 0:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.model.save_pretrained(folder, state_dict=weights)
            for path in files:
                shutil.copy2(path, Path(folder) / path.name)

    def close(self) -> None:
        """Release the engine's memory; the process group stays (others may use it)."""
        self._engine.destroy()
        del self._engine


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers under their checkpoint names; tied ones once, under their first name."""
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first.setdefault(id(tensor), name)
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if first[id(tensor)] == name}


def _buckets(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    bucket: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        bytes_ = getattr(tensor, "ds_numel", tensor.numel()) * tensor.element_size()
        if bucket and size + bytes_ > BUCKET_BYTES:
            yield bucket
            bucket, size = {}, 0
        bucket[name] = tensor
        size += bytes_
    if bucket:
        yield bucket


def _culprit(outputs: Outputs) -> str:
    for name in ("logprobs", "entropy", "values"):
        tensor = getattr(outputs, name)
        if tensor is not None and not bool(tensor.isfinite().all()):
            return f"{name} are not finite"
    return "the loss is not finite (what the model put out is)"


def _gather(faults: Sequence[str]) -> list[str]:
    """Every rank's faults on every rank; one number is exchanged where there are none."""
    if scoring.largest(len(faults)) == 0:
        return []
    everyone: list[list[str] | None] = [None] * distributed.world_size()
    if dist.is_initialized():
        dist.all_gather_object(everyone, list(faults))
    else:
        everyone = [list(faults)]
    return [f"rank {rank}: {fault}" for rank, own in enumerate(everyone) for fault in own or []]
