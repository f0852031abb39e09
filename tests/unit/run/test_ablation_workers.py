"""Worker processes of an ablation; no run gets as far as starting an engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from rlprm.cli.main import main
from rlprm.errors import ConfigError
from rlprm.run.ablation_workers import _devices, run_all, sigterm_exits
from rlprm.run.progress import Progress

DIES = "data.template._target_=tests.integration.planted_templates.killing"
WAITS = "data.template._target_=tests.integration.planted_templates.waiting"
FAILS = "data.max_prompt_tokens=1"
QUICK = ("recipe=chain_arithmetic_cpu", "data.train.chain.reader.source.size=4", "seeds=1", "--quiet")


def states(root):
    found = json.loads((root / "ablation" / "ablation.json").read_text())
    return {name: [run["error"] for run in cell["seeds"].values()] for name, cell in found["cells"].items()}


def test_a_worker_that_dies_takes_one_run_with_it_and_the_others_go_on(tmp_path, capsys):
    words = ["ablate", *QUICK, f"output_dir={tmp_path}", "--parallel", "2"]
    words += ["--cell", f"dies: {DIES}", "--cell", f"fails: {FAILS}", "--cell", f"fails_too: {FAILS} steps=3"]
    assert main(words) == 1
    found = states(tmp_path)
    assert all("worker process ended with exit code -9" in error for error in found["dies"])
    assert all("max_prompt_tokens" in error for cell in ("fails", "fails_too") for error in found[cell])
    said = capsys.readouterr()
    assert said.err.count("failed:") == 3
    assert "- dies, seed 0 failed: its worker process ended" in said.out


def test_in_one_process_a_failed_run_does_not_end_the_others(tmp_path):
    words = ["ablate", *QUICK, f"output_dir={tmp_path}"]
    assert main([*words, "--cell", f"one: {FAILS}", "--cell", f"two: {FAILS} steps=3"]) == 1
    assert set(states(tmp_path)) == {"one", "two"}


def start(folder, *words):
    """`rlprm ablate` as a process of its own, and in how many processes its first runs wait."""
    folder.mkdir()
    root = Path(__file__).resolve().parents[3]
    given = ["ablate", *QUICK, f"output_dir={folder / 'out'}", *words]
    program = [sys.executable, "-c", f"import sys; from rlprm.cli.main import main; sys.exit(main({given!r}))"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    parent = subprocess.Popen(program, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    return parent, 2 if "--parallel" in words else 1


def waits(folder, parent, count):
    """The ids of these processes, as soon as all of them wait."""
    deadline = time.monotonic() + 240.0
    while len(names := [path.name for path in folder.iterdir() if path.name.isdigit()]) < count:
        assert parent.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [int(name) for name in names]


def gone(process):
    deadline = time.monotonic() + 30.0
    while time.monotonic() < deadline:
        if not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


TWO = ("--parallel", "2", "--cell", f"one: {WAITS}", "--cell", f"two: {WAITS} steps=3")


@pytest.mark.parametrize(
    ("words", "number", "code"),
    [
        (TWO, signal.SIGTERM, 143),
        (TWO, signal.SIGKILL, -signal.SIGKILL),
        (TWO[2:], signal.SIGTERM, 143),
    ],
    ids=["workers-terminated", "workers-killed", "one-process-terminated"],
)
def test_no_run_outlives_the_ablation(tmp_path, words, number, code):
    folder = tmp_path / "here"
    parent, count = start(folder, *words)
    workers: list[int] = []
    try:
        workers += waits(folder, parent, count)
        parent.send_signal(number)
        assert parent.wait(180.0) == code
        assert all(gone(worker) for worker in workers)
        assert all((folder / str(worker)).read_text() == "ended" for worker in workers)  # what it had open was closed
    finally:
        parent.kill()
        parent.wait()
        for worker in workers:
            if not gone(worker):
                os.kill(worker, signal.SIGKILL)


def test_the_handler_is_put_back_and_is_the_main_threads_alone():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, sigterm_exits():
        assert signal.getsignal(signal.SIGTERM) != before
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    found = []

    def elsewhere():
        with sigterm_exits():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [before]


def test_a_report_that_cannot_be_written_is_said_once_and_ends_nothing(tmp_path, capsys):
    from tests.unit.run.test_ablation import planned

    def full():
        raise OSError(28, "No space left on device")

    todo = [planned(tmp_path, cell, 0, FAILS) for cell in ("a", "b", "c")]
    settings = {"workers": 1, "checkpoints": "none", "progress": Progress()}
    assert set(run_all(todo, tmp_path / "logs", **settings, after=full)) == {run.label for run in todo}
    assert capsys.readouterr().err.count("the report could not be written") == 1


def test_gpus_are_dealt_out(tmp_path, monkeypatch):
    from tests.unit.run.test_ablation import planned

    cpu = planned(tmp_path)
    engine = ("rollout=vllm_gpu", "rollout.engine.gpu_memory_utilization=0.4")
    gpu = planned(tmp_path, "a", 0, "placement=gpu1", *engine)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7,9")
    assert _devices([cpu], 3) == [None] * 3
    assert _devices([cpu, gpu], 2) == ["2,3", "5,7"]
    with pytest.raises(ConfigError, match="--parallel 6 with 5 GPUs"):
        _devices([gpu], 6)
