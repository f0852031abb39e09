"""What one rank does in the tests of resuming on another number of ranks: a list of jobs, given as JSON."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rlprm.engine import distributed, learner, optimizer
from rlprm.engine.learner import Learner
from rlprm.engine.model import load_causal
from tests.integration.learner_program import LENGTHS, SETTINGS, corpus, micros, steps, weights

AFTER = 2  # optimizer steps after the checkpoint
OWN_SEED, SAVED_SEED = 7, 100  # of the random state: before loading, and of rank 0 when it was saved


def main(rank: int, world: int, port: int, model: str, folder: Path, jobs: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    optimizer.PERSISTENT_ELEMENTS = 1000  # both kinds under ZeRO-3: kept whole, and partitioned
    learner.BUCKET_BYTES = 20_000
    distributed.join(rank, world, "127.0.0.1", port, timeout_s=120.0)
    data = corpus()
    denominator = int(data.response.sum())
    # whatever the number of ranks: the same sequences in the same step
    parts = micros(data, list(range(rank, len(LENGTHS), world)), budget=20, layout="padded")
    findings: dict[str, Any] = {}
    for job in jobs:
        settings = replace(SETTINGS, zero_stage=job["stage"], dtype=job["dtype"])
        subject = Learner(load_causal(model, settings.dtype, attention="sdpa", gradient_checkpointing=False), settings)
        found: dict[str, Any] = {}
        torch.manual_seed(OWN_SEED)
        if "from" in job:
            subject.load(folder / job["from"])
            found["random"] = torch.get_rng_state()
        else:
            steps(subject, parts, denominator, job["steps"])
            torch.manual_seed(SAVED_SEED + rank)
        subject.save(folder / job["name"])
        found["before"] = weights(subject)
        found["losses"] = steps(subject, parts, denominator, AFTER)
        found["after"] = weights(subject)
        found["steps"] = subject.steps
        found["groups"] = [(each["weight_decay"], each["lr"]) for each in subject._engine.optimizer.param_groups]
        subject.close()
        findings[job["name"]] = found
    distributed.leave()
    torch.save(findings, folder / f"{jobs[0]['name']}-findings-{rank}.pt")


if __name__ == "__main__":
    # a thread of gloo may abort a process that ends in the ordinary way, and all that counts is written
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], Path(sys.argv[5]), json.loads(sys.argv[6]))
    sys.stdout.flush()
    os._exit(0)
