"""Both engines on the same tokens: what the rollout engine says a token's probability is must be what the trainer says.

A difference here is there in every step of a run, as importance weights that are not 1 (training/rollout_* metrics).
:func:`rollout_side` and :func:`trainer_side` each belong in a process of their own: vLLM changes the process it runs in.
``python -m rlprm.doctor.parity`` is such a process on this machine, told by JSON on stdin.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlprm.doctor.finding import Finding, fail, ok, warn
from rlprm.doctor.wanted import Wanted
from rlprm.errors import RlprmError

CHECK = "log-probs"
LENGTHS = (8, 24, 48, 96)  # tokens of the fixed sequences
# dtype -> largest mean and largest single difference in nats. float32 engines differ by 1e-6 (measured). bf16 keeps 8 bits:
# 0.01 on single tokens of small models, more on large ones.
TOLERANCE = {"float32": (1e-4, 1e-3), "bfloat16": (0.02, 0.5)}
MUCH = 5.0  # times the tolerance: not rounding any more
GPU_SHARE = 0.8  # of one GPU's memory for the trainer's side of the comparison


def tokens(vocabulary: int) -> list[list[int]]:
    """The fixed sequences: pseudo-random ids, the same everywhere and always.

    >>> [row[:3] for row in tokens(100)][:2], [len(row) for row in tokens(100)]
    ([[74, 53, 96], [89, 46, 23]], [8, 24, 48, 96])
    """
    state, rows = 1, []
    for length in LENGTHS:
        row = []
        for _ in range(length):
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
            row.append((state >> 33) % vocabulary)
        rows.append(row)
    return rows


def asked(wanted: Wanted, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """What both sides are told, as plain data; None where there is nothing to compare."""
    path = wanted.models.get("model.path") if wanted.models else None
    if wanted.rollout is None or path is None or facts["models"][path]["vocabulary"] is None:
        return None
    return {
        "model": path,
        "dtype": wanted.dtype,
        "attention": wanted.attention,
        "temperature": wanted.temperature,
        "engine": dict(wanted.rollout),
        "tensor_parallel": wanted.placement.tensor_parallel,
        "device": wanted.device,
        "tokens": tokens(facts["models"][path]["vocabulary"]),
    }


def rollout_side(told: Mapping[str, Any]) -> list[list[float]]:
    """log mu of each token after its prefix, by the rollout engine of the configuration."""
    from rlprm.parts import made

    engine = made(told["engine"])(
        told["model"], told["dtype"], told["device"], max(LENGTHS) + 1, told["tensor_parallel"], ()
    )
    try:
        found: list[list[float]] = engine.logprobs(told["tokens"], told["temperature"])
    finally:
        engine.close()
    return found


def trainer_side(told: Mapping[str, Any]) -> list[list[float]]:
    """log pi of the same tokens, by the model and the forward pass of the learners."""
    import torch

    from rlprm.engine.model import load_causal
    from rlprm.engine.scoring import Frozen

    model = load_causal(told["model"], told["dtype"], attention=told["attention"], gradient_checkpointing=False)
    frozen = Frozen(model, token_budget=sum(LENGTHS), layout="padded", device=told["device"])
    rows = told["tokens"]
    flat = frozen.logprobs(
        _Sequences(
            torch.tensor([token for row in rows for token in row]),
            torch.tensor([len(row) for row in rows]),
            torch.ones(len(rows), dtype=torch.int64),
        ),
        told["temperature"],
    )
    return [part.tolist() for part in flat.split([len(row) for row in rows])]


class _Sequences:
    """Flat tokens, as the learners read them: the first token of each row is its prompt."""

    def __init__(self, tokens: Any, lengths: Any, prompt_lengths: Any) -> None:
        self.tokens, self.lengths, self.prompt_lengths = tokens, lengths, prompt_lengths


SIDES = {"rollout engine": rollout_side, "trainer": trainer_side}


def compared(
    node: str, engine: Sequence[Sequence[float]], trainer: Sequence[Sequence[float]], dtype: str
) -> Iterator[Finding]:
    """The differences of one model on both sides, against what its dtype allows."""
    pairs = [pair for ours, theirs in zip(engine, trainer, strict=True) for pair in zip(ours, theirs, strict=True)]
    differences = [abs(one - other) for one, other in pairs]
    largest, mean = max(differences), sum(differences) / len(differences)
    allowed_mean, allowed = TOLERANCE[dtype]
    said = f"{len(differences)} tokens in {dtype}: they differ by {mean:.1e} nats on average, {largest:.1e} at most"
    bad = max(mean / allowed_mean, largest / allowed)
    cure = (
        "the engines do not compute the same model: other weights or dtype on one side, a version that was not tested, or a "
        "model that this vLLM changes (see its log)"
    )
    if not bad <= MUCH:  # NaN is bad, too
        yield fail(CHECK, node, f"{said}; allowed are {allowed_mean:g} and {allowed:g}", cure)
    elif bad > 1:
        yield warn(CHECK, node, f"{said}; expected {allowed_mean:g} and {allowed:g} or less",
                   "watch training/rollout_* metrics; mismatch=truncate corrects for it")  # fmt: skip
    else:
        yield ok(CHECK, node, said)


def too_large(told: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Why the trainer's side cannot be loaded as a whole, "" where it can: it is compared without ZeRO."""
    bytes_ = facts["models"][told["model"]]["parameters"] * (4 if told["dtype"] == "float32" else 2)
    if told["device"] == "cpu":
        free = facts["memory"]["available"]
        return f"{bytes_ / 1e9:.0f} GB of weights twice, {free / 1e9:.0f} GB free" if 2.2 * bytes_ > free else ""
    largest = max((each["memory"] for each in facts["gpus"]), default=0)
    return f"{bytes_ / 1e9:.0f} GB of weights, {largest / 1e9:.0f} GB on a GPU" if bytes_ > GPU_SHARE * largest else ""


def not_tried(node: str, why: str) -> Finding:
    """They were not compared."""
    return warn(CHECK, node, f"not compared: {why}",
                "look at training/rollout_* metrics of the first step, or try a smaller model of the same family")  # fmt: skip


def here(
    node: str, told: Mapping[str, Any], environments: Mapping[str, Mapping[str, str]], timeout_s: float
) -> list[Finding]:
    """Both sides on this machine, a process each: at the same time on CPU, one after the other on a GPU."""
    deadline = time.monotonic() + timeout_s
    with tempfile.TemporaryDirectory(prefix="rlprm-doctor-") as folder:
        together = told["device"] == "cpu"
        started: dict[str, subprocess.Popen[str]] = {}
        try:
            answers: dict[str, Any] = {}
            for side in SIDES:
                started[side] = _start(side, told, environments.get(side, {}), Path(folder))
                if not together:
                    answers[side] = _finish(side, started[side], Path(folder), deadline)
            if together:
                answers = {side: _finish(side, process, Path(folder), deadline) for side, process in started.items()}
        finally:
            for process in started.values():
                process.kill()
                process.wait()
    for side, found in answers.items():
        if isinstance(found, str):
            return [no_answer(node, side, found)]
    return list(compared(node, answers["rollout engine"], answers["trainer"], told["dtype"]))


def no_answer(node: str, side: str, why: str) -> Finding:
    """One side gave none."""
    return fail(CHECK, node, f"the {side} gave none: {why}", "a run would end the same way; see the words above")


def _start(side: str, told: Mapping[str, Any], environment: Mapping[str, str], folder: Path) -> subprocess.Popen[str]:
    answer = folder / f"{side.split()[0]}.json"
    with (folder / f"{side.split()[0]}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "rlprm.doctor.parity"],
            stdin=subprocess.PIPE,
            stdout=log,  # vLLM prints what it likes
            stderr=log,
            text=True,
            env={**os.environ, **environment},
        )
    assert process.stdin is not None
    process.stdin.write(json.dumps({"side": side, "answer": str(answer), **told}))
    process.stdin.close()
    return process


def _finish(side: str, process: subprocess.Popen[str], folder: Path, deadline: float) -> Any:
    """The log-probs, or in words why there are none."""
    try:
        process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return "it took too long"
    answer = folder / f"{side.split()[0]}.json"
    if answer.is_file():
        return json.loads(answer.read_text(encoding="utf-8"))
    log = (folder / f"{side.split()[0]}.log").read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return f"{lines[-1][:300] if lines else 'nothing was said'} (exit code {process.returncode})"


def finite(rows: Any) -> bool:
    """
    >>> finite([[0.0, -1.5]]), finite([[float("nan")]])
    (True, False)
    """
    return all(math.isfinite(value) for row in rows for value in row)


def main() -> None:
    """One side."""
    told = json.loads(sys.stdin.read())
    try:
        found: Any = SIDES[told.pop("side")](told)
        if not finite(found):
            found = "it gave a NaN or an infinity"
    except RlprmError as error:
        found = str(error)
    partial = Path(told["answer"] + ".partial")
    partial.write_text(json.dumps(found), encoding="utf-8")
    os.replace(partial, told["answer"])


if __name__ == "__main__":
    main()
