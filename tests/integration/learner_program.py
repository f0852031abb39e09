"""What one rank does in the tests of the learner over two ranks; its findings go to a file that the tests read.

One pair of processes runs everything: joining a group costs far more than a learner of this size.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlprm.core.metrics import Sum
from rlprm.core.packing import build_micro, micro_batches
from rlprm.engine import distributed, learner, optimizer
from rlprm.engine.learner import Learner, Outputs
from rlprm.engine.model import load_causal
from rlprm.engine.optimizer import LearnerSettings
from rlprm.errors import NonFinite
from rlprm.records import MicroBatch

LENGTHS = (40, 6, 5, 9, 4, 12)  # one sequence holds half of the tokens
PROMPTS = (3, 2, 1, 4, 3, 2)

SETTINGS = LearnerSettings(
    lr=1e-2,
    betas=(0.9, 0.95),
    eps=1e-8,
    weight_decay=0.01,
    schedule="constant",
    warmup=0,
    total_steps=None,
    max_grad_norm=1.0,
    zero_stage=0,
    offload="none",
    token_budget=24,
    layout="padded",
    dtype="float32",
    device="cpu",
)
# AdamW without memory and with a huge eps moves each weight by -(lr / eps) * gradient: the gradient can be read off.
GAIN = 1e3
PROBE = replace(SETTINGS, lr=GAIN * 1e6, eps=1e6, betas=(0.0, 0.0), weight_decay=0.0, max_grad_norm=1e9)


@dataclass(frozen=True)
class Corpus:
    """Random sequences with per-token advantages; the loss below is divided by all of their response tokens."""

    tokens: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    advantages: Tensor

    @property
    def response(self) -> Tensor:
        rows = torch.arange(len(self.lengths)).repeat_interleave(self.lengths)
        position = torch.arange(len(self.tokens)) - (self.lengths.cumsum(0) - self.lengths)[rows]
        return position >= self.prompt_lengths[rows]


def corpus(lengths: Iterable[int] = LENGTHS, prompts: Iterable[int] = PROMPTS, vocabulary: int = 100) -> Corpus:
    generator = torch.Generator().manual_seed(5)
    sizes, starts = torch.tensor(tuple(lengths)), torch.tensor(tuple(prompts))
    total = int(sizes.sum())
    return Corpus(
        tokens=torch.randint(0, vocabulary, (total,), generator=generator),
        lengths=sizes,
        prompt_lengths=starts,
        advantages=torch.randn(total, generator=generator),
    )


def micros(data: Corpus, rows: list[int], *, budget: int, layout: str) -> list[MicroBatch]:
    """``rows`` of ``data`` in micro-batches of at most ``budget`` tokens."""
    plan = micro_batches([int(data.lengths[row]) for row in rows], budget, 99, layout)  # type: ignore[arg-type]
    fields = {"advantages": data.advantages}
    return [
        build_micro([rows[i] for i in part], data.lengths, data.tokens, data.response, fields, {}, layout)  # type: ignore[arg-type]
        for part in plan
    ]


def objective(denominator: int) -> Callable[[MicroBatch, Outputs], tuple[Tensor, dict[str, Any]]]:
    """A loss with a curvature of its own per token, and the entropy in it."""

    def loss(micro: MicroBatch, outputs: Outputs) -> tuple[Tensor, dict[str, Any]]:
        assert outputs.logprobs is not None
        assert outputs.entropy is not None
        gain = torch.exp(outputs.logprobs / 4) * micro.token_fields["advantages"] + 0.1 * outputs.entropy
        value = -(gain * micro.response_mask).sum() / denominator
        return value, {"loss": Sum(float(value.detach().double()))}

    return loss


def gradient(model: str, settings: LearnerSettings, parts: list[MicroBatch], denominator: int) -> dict[str, Tensor]:
    """The gradient of one update, read off the weights; empty where this is not rank 0."""
    subject = Learner(load_causal(model, "float32", attention="sdpa", gradient_checkpointing=False), settings)
    before = {name: tensor.clone() for name, tensor in subject.named_weights()}
    subject.update(parts, objective(denominator), temperature=0.7, entropy=True)
    after = {name: tensor.clone() for name, tensor in subject.named_weights()}
    subject.close()
    return {name: (before[name] - after[name]).double() / GAIN for name in before}


def steps(subject: Learner, parts: list[MicroBatch], denominator: int, count: int) -> list[tuple[float, float]]:
    """(loss summed over ranks, gradient norm) of ``count`` updates."""
    out = []
    for _ in range(count):
        metrics = subject.update(parts, objective(denominator), temperature=0.7, entropy=True)
        own = metrics["loss"].total if "loss" in metrics else 0.0
        total = distributed.GroupReduce().sum(torch.tensor(own, dtype=torch.float64))
        out.append((float(total), metrics["grad_norm"]))
    return out


def weights(subject: Learner) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in subject.named_weights()}


def stage_findings(model: str, folder: Path, settings: LearnerSettings, parts: list[MicroBatch], denom: int) -> Any:
    """Losses; a bad loss on rank 1; and whether a resumed learner goes on as the first one did."""
    rank = distributed.rank()

    def make() -> Learner:
        checkpointing = settings.zero_stage == 3
        return Learner(
            load_causal(model, settings.dtype, attention="sdpa", gradient_checkpointing=checkpointing), settings
        )

    first = make()
    found: dict[str, Any] = {"losses": steps(first, parts, denom, 3)}

    def poisoned(micro: MicroBatch, outputs: Outputs) -> tuple[Tensor, dict[str, Any]]:
        value, metrics = objective(denom)(micro, outputs)
        return value * (float("inf") if rank == 1 else 1.0), metrics

    before = weights(first)
    try:
        first.update(parts, poisoned, temperature=0.7, entropy=True)
    except NonFinite as error:
        found["refused"] = str(error)
    found["moved_by_refused"] = any(not torch.equal(before[k], v) for k, v in weights(first).items())
    found["steps"] = first.steps
    first.save(folder)
    found["continued"] = steps(first, parts, denom, 2)
    ahead = weights(first)
    first.close()
    second = make()
    second.load(folder)
    found["resumed"] = steps(second, parts, denom, 2)
    found["resumed_weights_equal"] = all(torch.equal(ahead[k], v) for k, v in weights(second).items())
    found["resumed_steps"] = second.steps
    second.close()
    return found


def main(rank: int, world: int, port: int, model: str, folder: Path) -> None:
    torch.set_num_threads(1)
    optimizer.PERSISTENT_ELEMENTS = 0  # at this size ZeRO-3 would otherwise partition nothing
    learner.BUCKET_BYTES = 20_000  # several buckets
    distributed.join(rank, world, "127.0.0.1", port, timeout_s=120.0)
    data = corpus()
    denominator = int(data.response.sum())
    # rank 0: the long sequence and four others in four micro-batches; rank 1: one short sequence
    rows = [0, 1, 2, 3, 5] if rank == 0 else [4]
    parts = micros(data, rows, budget=20, layout="padded")
    findings: dict[str, Any] = {"micro_batches": len(parts)}
    for stage in (0, 1, 2, 3):
        clock = time.perf_counter()
        settings = replace(SETTINGS, zero_stage=stage)
        findings[f"float32-{stage}"] = stage_findings(model, folder / f"float32-{stage}", settings, parts, denominator)
        findings[f"gradient-{stage}"] = gradient(model, replace(PROBE, zero_stage=stage), parts, denominator)
        half = replace(SETTINGS, zero_stage=stage, dtype="bfloat16")
        findings[f"bfloat16-{stage}"] = stage_findings(model, folder / f"bfloat16-{stage}", half, parts, denominator)
        findings[f"seconds-{stage}"] = time.perf_counter() - clock
    packed = micros(data, rows, budget=40, layout="packed")
    findings["gradient-packed"] = gradient(model, replace(PROBE, zero_stage=3), packed, denominator)
    alone = [*parts, *micros(data, [4], budget=20, layout="padded")] if rank == 0 else []  # rank 1 has nothing
    findings["gradient-idle-rank"] = gradient(model, replace(PROBE, zero_stage=3), alone, denominator)
    subject = Learner(
        load_causal(model, "float32", attention="sdpa", gradient_checkpointing=False), replace(SETTINGS, zero_stage=3)
    )
    mine = corpus() if rank == 0 else corpus((5,), (2,))  # different numbers of forward passes under ZeRO-3
    findings["logprobs"] = subject.logprobs(mine, 0.7)
    findings["shapes"] = [(name, tuple(tensor.shape)) for name, tensor in subject.named_shapes()]
    findings["names"] = [name for name, _ in subject.named_weights()]
    subject.export(folder / "export", model)
    subject.close()
    findings["largest"] = float(distributed.GroupReduce().max(torch.tensor([float("nan") if rank else 1.0]))[0])
    findings["sum"] = distributed.GroupReduce().sum(torch.tensor([2**24 + 1, rank])).tolist()
    distributed.leave()
    torch.save(findings, folder / f"findings-{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], Path(sys.argv[5]))
