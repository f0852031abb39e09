"""Whole runs on tiny models: a warmed model, configurations in the user's own words, and what a run leaves behind."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console

from rlprm import driver
from rlprm.batch import Batch, Row, jagged_texts
from rlprm.cli.compose import Composed, composed
from rlprm.config import TrainConfig, validated
from rlprm.data.tasks.chain_arithmetic import ChainArithmetic, write_model_folder
from rlprm.data.tokenizer import load_tokenizer
from rlprm.run import training
from rlprm.run.progress import Progress

# Two-line chains modulo 3: a model that has learnt the form only is right one time in three, so most groups are mixed.
TASK = ChainArithmetic(modulus=3, operations=(2, 2))

CHAIN = (
    "data.train.chain.reader.source.modulus=3",
    "data.train.chain.reader.source.operations=[2,2]",
    "data.train.chain.reader.source.size=64",
    "data.evaluation.chain_test.source.size=8",
    "data.max_prompt_tokens=16",
    "max_response_tokens=16",
)
SMALL = (
    "prompts_per_step=4",
    "keep.min_prompts=2",
    "responses_per_prompt=4",
    "policy.lr=3e-4",
    "policy.warmup=0",
    "evaluation.every=0",
    "checkpoint.every=0",
    "tracker.tensorboard=false",
)
PRM = ("streams.process.source.learner.lr=3e-4", "streams.process.source.kind.beta=1.0")
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
            tokens.append([*tokenizer(prompt + response).input_ids, tokenizer.eos_token_id])
        longest = max(map(len, tokens))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in tokens])
        labels = torch.tensor(
            [[-100] * p + row[p:] + [-100] * (longest - len(row)) for p, row in zip(prompts, tokens, strict=True)]
        )
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return str(folder)


def configured(folder: Path, model: str, *overrides: str) -> tuple[TrainConfig, Composed]:
    """A run's configuration, exactly as `rlprm train` would make it; later overrides win."""
    task = () if any(override.startswith("data=") for override in overrides) else CHAIN
    made = composed("train", [*SMALL, *task, f"output_dir={folder}", f"model.path={model}", *overrides])
    return validated(TrainConfig, made.values), made


# Fixed texts of the task: expression, working and end, each scored from its second token on.
PROBES = ["1+2*2\n1+2=0\n0*2=0", "2-1-2\n2-1=1\n1-2=1", "0*1+1\n0*1=2\n2+1=0", "2+2"]


@dataclass(kw_only=True)
class Publication:
    """What one publish left behind: log-probs of the probe tokens on each engine and on the trainer."""

    version: float
    engines: list[torch.Tensor]
    trainer: torch.Tensor

    @property
    def gap(self) -> float:
        """Largest difference of a log-prob between any engine and the trainer, in nats."""
        return max(float((engine - self.trainer).abs().max()) for engine in self.engines)


@dataclass(kw_only=True)
class Done:
    """A run that has ended: its folder and screen, and what was seen of it from outside while it ran."""

    folder: Path
    screen: str = ""
    files_before: set[str] = field(default_factory=set)  # of the run folder, when the first weights were published
    published: list[Publication] = field(default_factory=list)
    rows: list[Sequence[Row]] = field(default_factory=list)  # of each step
    restored: int = 0  # prompts that had been taken when the run began
    taken: int = 0  # ... and when it ended

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """``metrics.jsonl``: one dictionary per step."""
        return json_lines(self.folder / "metrics.jsonl")

    @property
    def metrics_of_steps(self) -> list[dict[str, Any]]:
        """Those of training steps; an evaluation before the first has a line of its own."""
        return [row for row in self.metrics if row["step"] > 0]

    @property
    def rollouts(self) -> list[dict[str, Any]]:
        """``rollouts.jsonl``: one dictionary per response."""
        return json_lines(self.folder / "rollouts.jsonl")

    @property
    def exported(self) -> Path:
        """What the learners exported at the end."""
        return self.folder.parent / "exported"


def train(folder: Path, model: str, *overrides: str) -> Done:
    """A whole run through the program's own entry; only what passes by is looked at, nothing is replaced."""
    config, made = configured(folder, model, *overrides)
    screen, loop = io.StringIO(), driver.train
    done = Done(folder=training.run_folder(config))

    def watched(run: driver.Run) -> None:
        done.restored = taken(run)
        loop(replace(run, transfer=Transfer(done, run.transfer, config), select=Select(done, run.select)))
        done.taken = taken(run)
        for group in filter(None, (run.policy.group, getattr(run.reference, "group", None))):
            group.get(group.all(lambda worker: worker.export, str(done.exported)), "export")

    with patch.object(driver, "train", watched):
        training.train(config, made, Progress(Console(file=screen, width=400), patience=1e9))
    done.screen = screen.getvalue()
    return done


def taken(run: driver.Run) -> int:
    """Prompts drawn so far."""
    return sum(run.prompts.state()["taken"].values())


class Transfer:
    """The run's own transfer; after each publish the probes are scored on both sides, by the calls of training."""

    def __init__(self, done: Done, inner: Any, config: TrainConfig) -> None:
        self._done = done
        self._inner = inner
        self._temperature = config.temperature
        tokenizer = load_tokenizer(config.model.path)
        self._probes = [tokenizer(text, add_special_tokens=False).input_ids for text in PROBES]

    def publish(self, policy: Any, rollouts: Any) -> None:
        if not self._done.published:
            self._done.files_before = {path.name for path in self._done.folder.iterdir()}
        self._inner.publish(policy, rollouts)
        self._done.published.append(
            Publication(
                version=self._inner.metrics["weights/version"],
                engines=[
                    torch.tensor([value for row in answer for value in row])
                    for answer in rollouts.logprobs(self._probes, self._temperature)
                ],
                trainer=self._on_trainer(policy),
            )
        )

    def _on_trainer(self, policy: Any) -> torch.Tensor:
        """Through `Policy.logprobs`, one shard per rank; a sequence's first token has none, and both sides say 0."""
        import ray  # late: imported before rlprm.actors, Ray would not know of its authentication

        pairs = [((first,), tuple(others)) for first, *others in self._probes]
        shards = (ray.put(jagged_texts(pairs[:2])), ray.put(jagged_texts(pairs[2:])))
        batch = Batch(step=0, rows=(), shards=shards, texts=(), members=(), selected=(), counts={})
        return torch.cat(policy.group.get(list(policy.logprobs(batch).shards), "probes"))


class Select:
    """The run's own choice of rows, and a look at what it is given."""

    def __init__(self, done: Done, inner: Any) -> None:
        self._done = done
        self._inner = inner

    def __call__(self, rows: Sequence[Row], scores: Any) -> Any:
        self._done.rows.append(rows)
        return self._inner(rows, scores)


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def moved(folder: Path, model: str) -> float:
    """Largest change of any weight between an exported model and the one it started from."""
    from safetensors.torch import load_file

    first, now = load_file(Path(model) / "model.safetensors"), load_file(folder / "model.safetensors")
    assert first.keys() == now.keys()
    return max(float((now[name] - first[name]).abs().max()) for name in first)
