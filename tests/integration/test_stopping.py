"""SIGTERM to a real command: a run finishes its step and saves, whatever has nothing to save ends at once."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.integration import support
from tests.integration.support import CHAIN, PRM, SMALL, TRANSFORMERS
from tests.integration.test_cli_commands import marked
from tests.integration.test_resume import decided

pytestmark = pytest.mark.integration

PATIENCE_S = 150.0  # of a loaded machine of two cores
WORDS = (*SMALL, *CHAIN, *PRM, *TRANSFORMERS)


class Command:
    """`rlprm ...` in a process of its own, and all processes that it starts."""

    def __init__(self, output: Path, *words: str) -> None:
        self.output = output
        self.mark = f"RLPRM_TEST_{uuid.uuid4().hex}"
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rlprm.cli.main", *words],
                stdout=file,
                stderr=file,
                start_new_session=True,
                env={**os.environ, self.mark: "1"},
            )

    def until(self, met: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not met():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.02)

    def terminated(self) -> int:
        """Its exit code after SIGTERM; no process of its is left, and nobody has printed a crash."""
        self.process.send_signal(signal.SIGTERM)
        return self.ended()

    def ended(self) -> int:
        code = self.process.wait(PATIENCE_S)
        psutil.wait_procs(marked(self.mark), timeout=20.0)
        assert marked(self.mark) == []
        for sign in ("Traceback", "SIGTERM received", "@ 0x"):
            assert sign not in self.said, self.said
        return code

    @property
    def said(self) -> str:
        return self.output.read_text()


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    started: list[Command] = []

    def start(*words: str) -> Command:
        started.append(Command(tmp_path / f"output{len(started)}", *words))
        return started[-1]

    yield start
    for each in started:
        for process in marked(each.mark):
            process.kill()
        each.process.wait()


def test_a_run_finishes_its_step_saves_and_goes_on_as_if_nothing_had_been(
    ray_once: None, model: str, tmp_path: Path, command: Callable[..., Command]
) -> None:
    folder = tmp_path / "train" / "seed0"
    running = command("train", *WORDS, f"model.path={model}", f"output_dir={tmp_path}", "steps=500")
    rollouts = folder / "rollouts.jsonl"  # written when a step is over
    running.until(lambda: rollouts.exists() and rollouts.stat().st_size > 0)
    assert running.terminated() == 143
    ended = re.search(r"stopped after step (\d+), which is saved; the same command with resume=auto", running.said)
    assert ended, running.said
    last = int(ended[1])
    assert f"asked to end: finishing step {last}, then saving" in running.said
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step_{last:06d}"]  # none was due
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, last + 1))

    resumed = support.train(tmp_path, model, *WORDS, f"steps={last + 1}", "resume=auto")
    whole = support.train(tmp_path / "whole", model, *WORDS, f"steps={last + 1}")
    assert len(resumed.rows) == 1
    assert [decided(row) for row in resumed.metrics] == [decided(row) for row in whole.metrics]
    for role in ("policy", "process"):
        one, other = (run.exported / role / "model.safetensors" for run in (whole, resumed))
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.long  # with the first over a minute
def test_asked_twice_it_ends_at_once(model: str, tmp_path: Path, command: Callable[..., Command]) -> None:
    """In the first step, which is long enough for the second wish to come in time."""
    running = command(
        "train", *WORDS, f"model.path={model}", f"output_dir={tmp_path}", "steps=500", "prompts_per_step=4096",
        "responses_per_prompt=32", "keep.min_prompts=4096",
    )  # fmt: skip
    folder = tmp_path / "train" / "seed0"
    running.until(lambda: (folder / "run.json").exists())  # its parts stand
    time.sleep(1.0)
    running.process.send_signal(signal.SIGTERM)
    running.until(lambda: "asked to end: finishing step 1, then saving" in running.said)
    assert running.terminated() == 130
    assert "interrupted; what was saved is kept" in running.said
    assert not list((folder / "checkpoints").glob("step_*"))


@pytest.mark.long  # with the first over a minute
def test_what_saves_nothing_ends_at_once(model: str, tmp_path: Path, command: Callable[..., Command]) -> None:
    running = command(
        "sft", f"model.path={model}", f"output={tmp_path / 'warm'}", "steps=100000", "examples.modulus=3",
        "examples.operations=[2,2]",
    )  # fmt: skip
    logs = tmp_path / "warm.logs"
    running.until(lambda: logs.is_dir() and any(logs.iterdir()))  # Ray is up, learners are there or come
    assert running.terminated() == 130
    assert "rlprm sft: interrupted" in running.said
