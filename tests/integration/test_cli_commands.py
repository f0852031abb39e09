"""train -> export -> evaluate on the command line; Ctrl-C in the middle of a step."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from rlprm.cli.main import INTERRUPTED, main
from rlprm.report.runs import read_metrics
from tests.integration import support

pytestmark = pytest.mark.integration

PATIENCE_S = 240.0  # of a loaded machine of two cores


def evaluated(folder: Path, step: int) -> dict[str, float]:
    """The accuracies that the run in ``folder`` logged after ``step``."""
    row = next(row for row in read_metrics(folder) if row["step"] == step)
    return {name: value for name, value in row.items() if name.startswith("val-core/")}


@pytest.mark.parametrize(
    "ranks",
    [
        pytest.param(("policy.zero_stage=1",), id="one rank"),
        pytest.param(("placement.policy_ranks=2", "policy.zero_stage=3"), id="ZeRO-3", marks=pytest.mark.long),
    ],
)
def test_an_exported_policy_answers_as_the_run_did(ray_once, model, tmp_path, capsys, ranks):
    common = [*support.CHAIN, *support.VLLM]
    run, exported, results = tmp_path / "runs/train/seed0", tmp_path / "exported", tmp_path / "results.json"
    words = [*support.SMALL, *support.PRM, *common, *ranks, f"output_dir={tmp_path}/runs", f"model.path={model}"]
    words += ["steps=2", "evaluation.every=2", "evaluation.limit=8", "checkpoint.every=1", "policy.lr=3e-3"]
    assert main(["train", "--quiet", *words]) == 0
    before, after = evaluated(run, 0), evaluated(run, 2)
    assert before != after  # or else the initial model would pass for the trained one

    assert main(["export", "--quiet", str(run), str(exported)]) == 0
    said = capsys.readouterr().out
    assert f"wrote {exported}/policy (step 2 of {run})" in said
    assert f"wrote {exported}/process (step 2 of {run})" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported", "runs"]  # no left-overs beside them

    # the engine of `evaluate` is vLLM; seeds are those of training, so the same weights answer the same
    shared = [word for word in common if not word.startswith("data.train.chain.reader.source.size=")]
    measure = ["evaluate", "--quiet", *shared, f"model.path={exported}/policy"]
    assert main([*measure, "temperatures=[0,1]", "samples=4", "limit=8", f"output={results}"]) == 0
    found = json.loads(results.read_text())["results"]
    again = {name: value for each in found for name, value in each["metrics"].items() if name.startswith("val-core/")}
    assert again == after
    assert "greedy" in capsys.readouterr().out

    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("policy", "process"):
        assert AutoTokenizer.from_pretrained(exported / name)("1+1=").input_ids
        AutoModelForCausalLM.from_pretrained(exported / name)
        assert moved(exported / name, model) > 0  # the PRM has learnt too


def test_ctrl_c_in_a_step_keeps_what_was_saved_and_leaves_no_process(model, tmp_path):
    mark = f"RLPRM_TEST_{uuid.uuid4().hex}"  # every process of the run inherits it, also those that change parents
    memory = set(os.listdir("/dev/shm"))
    run = tmp_path / "runs/train/seed0"
    words = [*support.SMALL, *support.PRM, *support.CHAIN, *support.VLLM, f"output_dir={tmp_path}/runs"]
    words += [f"model.path={model}", "steps=100000", "checkpoint.every=1"]
    with (tmp_path / "output").open("w") as output:
        # a session of its own: SIGINT then reaches the whole foreground group, as it does from a terminal
        started = subprocess.Popen(
            [sys.executable, "-m", "rlprm.cli.main", "train", *words],
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, mark: "1"},
        )
        try:
            wait_for(lambda: (run / "checkpoints/step_000002").is_dir() or started.poll() is not None)
            assert started.poll() is None, (tmp_path / "output").read_text()[-2000:]
            assert len(marked(mark)) > 4  # driver, Ray, engine, policy, PRM, judge
            os.killpg(started.pid, signal.SIGINT)
            assert started.wait(PATIENCE_S) == INTERRUPTED
            wait_for(lambda: not marked(mark), limit_s=20.0)
            assert marked(mark) == []
        finally:
            for process in marked(mark):
                process.kill()
    said = (tmp_path / "output").read_text()
    assert "interrupted; what was saved is kept" in said
    assert "Traceback" not in said
    assert orphans(set(os.listdir("/dev/shm")) - memory) == set()
    # what is there can be resumed from: the newest checkpoint is whole, and the last metrics line is too
    from rlprm.run.exporting import newest_checkpoint
    from rlprm.run.progress import Progress

    step, _ = newest_checkpoint(run, Progress(quiet=True))
    assert step >= 2
    assert read_metrics(run)[-1]["step"] >= step


def moved(folder: Path, initial: str) -> float:
    """Largest change of any weight between two model folders."""
    first, now = load_file(Path(initial) / "model.safetensors"), load_file(folder / "model.safetensors")
    return max(float((now[name] - first[name]).abs().max()) for name in first)


def marked(mark: str) -> list[psutil.Process]:
    """Live processes whose environment holds ``mark``."""
    found = []
    for process in psutil.process_iter():
        try:
            if mark in process.environ() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def orphans(names: set[str]) -> set[str]:
    """Those of the shared-memory segments that no live process has mapped; others may belong to another run."""
    mapped = ""
    for process in psutil.process_iter():
        with contextlib.suppress(OSError):
            mapped += Path(f"/proc/{process.pid}/maps").read_text()
    return {name for name in names if Path("/dev/shm", name).exists() and f"/dev/shm/{name}" not in mapped}


def wait_for(met: Callable[[], bool], limit_s: float = PATIENCE_S) -> None:
    """Until ``met``, or until the time is over."""
    end = time.monotonic() + limit_s
    while not met() and time.monotonic() < end:
        time.sleep(0.2)
