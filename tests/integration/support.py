"""Whole runs on tiny models: a warmed chain-arithmetic model, configurations in the user's own words, and what is left."""

from __future__ import annotations

import io
import json
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from rlprm import driver
from rlprm.batch import Batch, jagged_texts
from rlprm.cli.compose import Composed, composed
from rlprm.config import TrainConfig, validated
from rlprm.data.tasks.chain_arithmetic import ChainArithmetic, write_model_folder
from rlprm.run import training
from rlprm.run.checkpoint import Checkpointer
from rlprm.run.progress import Progress

MODULUS = 3  # a guess is right one time in three, so most groups are mixed
# Two-line chains: short enough for a model of 0.1 M parameters, long enough to have steps.
TASK = ChainArithmetic(modulus=MODULUS, operations=(2, 2))
RESPONSE = 16  # tokens: two lines of five characters, a newline and EOS are 12

SMALL = (
    "data.train.chain.reader.source.modulus=3",
    "data.train.chain.reader.source.operations=[2,2]",
    "data.train.chain.reader.source.size=64",
    "data.evaluation.chain_test.source.size=8",
    "data.max_prompt_tokens=16",
    f"max_response_tokens={RESPONSE}",
    "prompts_per_step=4",
    "keep.min_prompts=2",
    "responses_per_prompt=4",
    "policy.lr=1e-3",
    "policy.warmup=0",
    "evaluation.every=0",
    "checkpoint.every=0",
    "tracker.tensorboard=false",
)
PRM = ("streams.process.source.learner.lr=1e-3", "streams.process.source.kind.beta=1.0")
VLLM = ("rollout.engine.kv_cache_bytes=16777216", "rollout.engine.max_num_seqs=32")
TRANSFORMERS = ("rollout=transformers", "rollout.engine.max_num_seqs=32")


def warmed_model(folder: Path, updates: int = 150) -> str:
    """A tiny model that answers some chains right and some wrong: without mixed groups no step would move a weight."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_model_folder(folder, 0, hidden=64, layers=2, heads=2, mlp=128, context=128)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    texts = list(TASK.sft(seed=1, count=32 * updates, beliefs={}, probability=0.0))
    for start in range(0, len(texts), 32):
        prompts, tokens = [], []
        for prompt, response in texts[start : start + 32]:
            prompts.append(len(prompt))
            tokens.append(tokenizer(prompt + response).input_ids + [tokenizer.eos_token_id])
        longest = max(map(len, tokens))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in tokens])
        labels = torch.tensor([[-100] * p + row[p:] + [-100] * (longest - len(row)) for p, row in zip(prompts, tokens, strict=True)])
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return str(folder)


def configured(folder: Path, model: str, *overrides: str) -> tuple[TrainConfig, Composed]:
    """A run's configuration, exactly as `rlprm train` would make it; later overrides win."""
    made = composed("train", [*SMALL, f"output_dir={folder}", f"model.path={model}", *overrides])
    return validated(TrainConfig, made.values), made


def train(folder: Path, model: str, *overrides: str) -> tuple[Path, str]:
    """A whole run through the program's own entry; its folder, and what was said on the screen."""
    config, made = configured(folder, model, *overrides)
    screen = io.StringIO()
    path = training.train(config, made, Progress(Console(file=screen, width=400), patience=1e9))
    return path, screen.getvalue()


@dataclass
class Publication:
    """What one `publish` left behind: log-probs of the probe tokens on each engine and on the trainer."""

    version: float
    engines: list[torch.Tensor]
    trainer: torch.Tensor


@dataclass
class Watched:
    """The run's own transfer; after each publish the probe tokens are scored on both sides."""

    inner: Any
    temperature: float
    seen: list[Publication] = field(default_factory=list)

    def publish(self, policy: Any, rollouts: Any) -> None:
        self.inner.publish(policy, rollouts)
        engines = [
            torch.tensor([value for row in answer for value in row])
            for answer in rollouts.logprobs([list(p + r) for p, r in PROBES], self.temperature)
        ]
        self.seen.append(Publication(self.inner.metrics["weights/version"], engines, on_trainer(policy)))


# Every token but the first is a response token, so the trainer scores it; ids of the chain tokenizer, any order.
PROBES = [((5,), tuple(range(6, 19))), ((18,), (4, 4, 7, 1, 12, 12, 9)), ((9,), (9, 10, 15, 11, 18, 13, 4))]


def on_trainer(policy: Any) -> torch.Tensor:
    """The probes' log-probs through the driver's own call, one shard per rank; 0 for each first token."""
    import ray  # here: whoever imports Ray before rlprm.actors fixes its authentication mode too early

    shards = [ray.put(jagged_texts(PROBES[:2])), ray.put(jagged_texts(PROBES[2:]))]
    values = policy.logprobs(probe_batch(shards))
    return torch.cat([torch.as_tensor(part) for part in ray.get(list(values.shards))])


def probe_batch(shards: list[Any]) -> Batch:
    """A batch with nothing but shards: all that log-probs look at."""
    return Batch(
        step=0, rows=(), shards=tuple(shards), members=(), selected=(), counts={}, examples=()
    )


@dataclass(kw_only=True)
class Done:
    """A run that was watched: its folder, its publications, and exports made by the learners at the end."""

    folder: Path
    seen: list[Publication]
    exported: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return metrics(self.folder)


def watched(folder: Path, model: str, *overrides: str) -> Done:
    """A run assembled and driven as :func:`rlprm.run.training.train` does it, with every publish checked."""
    config, made = configured(folder, model, *overrides)
    path, exported = training.run_folder(config), folder / "exported"
    path.mkdir(parents=True)
    checkpointer = Checkpointer(path / "checkpoints", config.checkpoint.keep_last)
    with ExitStack() as stack:
        run = stack.enter_context(
            training.assembled(config, made, path, 1, None, checkpointer, Progress(quiet=True))
        )
        transfer = Watched(run.transfer, config.temperature)
        driver.train(replace(run, transfer=transfer))
        for group in {id(g): g for g in (run.policy.group, getattr(run.reference, "group", run.policy.group))}.values():
            group.get(group.all(lambda worker: worker.export, str(exported)), "export")
    return Done(folder=path, seen=transfer.seen, exported=exported)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """``metrics.jsonl``, one dictionary per step."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def rollouts(folder: Path) -> list[dict[str, Any]]:
    """``rollouts.jsonl``, one dictionary per response."""
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


def moved(folder: Path, model: str) -> float:
    """Largest change of any weight between an exported model and the one it started from."""
    from safetensors.torch import load_file

    first, now = load_file(Path(model) / "model.safetensors"), load_file(folder / "model.safetensors")
    return max(float((now[name] - first[name]).abs().max()) for name in first)
