"""A healthy pair of nodes as plain facts, gathered for real, and faults planted in them."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

from rlprm.actors import facts as node_facts
from rlprm.cli.compose import composed
from rlprm.config import TrainConfig, validated
from rlprm.doctor.finding import Finding
from rlprm.doctor.judging import judged
from rlprm.doctor.wanted import Wanted, wanted

BASE = ("rollout=transformers", "placement=cpu")


def model_folder(folder: Path, value: float = 0.5) -> Path:
    """What of a model is looked at, without a model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"vocab_size": 32, "model_type": "qwen2"}))
    (folder / "tokenizer.json").write_text("{}")
    save_file({"weight": torch.full((64, 64), value)}, folder / "model.safetensors")
    return folder


def asked(tmp_path: Path, *overrides: str) -> Wanted:
    """What a training run with a model and a run folder under ``tmp_path`` asks of its environment."""
    model = model_folder(tmp_path / "model")
    words = [*BASE, f"model.path={model}", f"output_dir={tmp_path / 'runs'}", *overrides]
    return wanted(validated(TrainConfig, composed("train", words).values))


def gathered(run: Wanted, names: Sequence[str] = ("node0", "node1")) -> dict[str, dict[str, Any]]:
    """This machine's facts, as those of healthy nodes that share their storage."""
    found = node_facts.gather(run.folder, None, tuple(run.models.values()), run.data, None)
    found["environment"] |= {"RAY_AUTH_MODE": "token", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    found["folder"]["sees"] = True
    return {name: copy.deepcopy(found) for name in names}


def nodes(facts: dict[str, dict[str, Any]]) -> list[Any]:
    return [
        SimpleNamespace(index=index, name=name, address="127.0.0.1", cpus=8.0, gpus=float(len(each["gpus"])))
        for index, (name, each) in enumerate(facts.items())
    ]


def diagnosed(run: Wanted, facts: dict[str, dict[str, Any]], store: int | None = 200_000_000) -> list[Finding]:
    """What is said of these facts."""
    return judged(facts, run, nodes(facts), dict.fromkeys(facts, store), True)


def bad(findings: Sequence[Finding]) -> list[Finding]:
    return [each for each in findings if each.level != "ok"]


def only(findings: Sequence[Finding], check: str) -> Finding:
    """The one finding that is not ok; it must be of ``check`` and bring a cure."""
    found = bad(findings)
    assert [each.check for each in found] == [check], [each.line() for each in found]
    assert found[0].cure or check == "placement"
    return found[0]
