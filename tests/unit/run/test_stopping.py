"""SIGTERM: the first lets a step end, the second and Ctrl-C do not."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlprm.cli import main as cli
from rlprm.errors import ConfigError, Stopped
from rlprm.run.stopping import Stopping, sigterm_interrupts


@pytest.fixture(autouse=True)
def nobody_else_listens() -> Iterator[None]:
    """A Ray that ran in this process has left its own handler, which would be what SIGTERM did before."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


def test_the_first_asks_and_is_said_once_the_second_ends_at_once() -> None:
    said: list[str] = []
    stopping = Stopping(said.append)
    before = signal.getsignal(signal.SIGTERM)
    with stopping.on_sigterm(), stopping.steps(4):
        stopping.over(4)
        assert not stopping.asked
        signal.raise_signal(signal.SIGTERM)
        assert stopping.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert said == ["asked to end: finishing step 5, then saving (asked again, or with Ctrl-C, it ends at once)"]
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(Stopped, match="stopped before the next run began"):
        stopping.refuse("the next run began")


def test_without_a_step_under_way_there_is_nothing_to_finish() -> None:
    said: list[str] = []
    stopping = Stopping(said.append)
    with stopping.on_sigterm(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    assert (stopping.asked, said) == (False, [])
    stopping.refuse("nobody has asked")


def test_at_once_means_what_it_meant_before() -> None:
    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        with pytest.raises(SystemExit) as ended, Stopping(print).on_sigterm():
            signal.raise_signal(signal.SIGTERM)
        assert ended.value.code == 143
        assert signal.getsignal(signal.SIGTERM) is leave
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_words_wait_for_whoever_is_printing() -> None:
    """A handler that printed by itself would wait for a lock that its own thread holds."""
    printing, said = threading.Lock(), []

    def say(words: str) -> None:
        with printing:
            said.append(words)

    stopping = Stopping(say)
    with stopping.on_sigterm(), stopping.steps(1), printing:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.05)
        assert said == []
    assert len(said) == 1


def test_other_threads_and_forked_processes() -> None:
    before = signal.getsignal(signal.SIGTERM)
    found: list[object] = []

    def elsewhere() -> None:
        with Stopping(print).on_sigterm(), sigterm_interrupts():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [before]
    stopping = Stopping(print)
    with stopping.on_sigterm(), stopping.steps(1):
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    assert not stopping.asked


@pytest.mark.parametrize(
    ("command", "error", "code", "words"),
    [
        ("train", Stopped("stopped after step 7, which is saved"), 143,
         "rlprm train: stopped after step 7, which is saved; the same command with resume=auto continues\n"),
        ("ablate", Stopped("stopped after step 7, which is saved"), 143,
         "rlprm ablate: stopped after step 7, which is saved; the same command continues\n"),
        ("train", KeyboardInterrupt(), 130, "rlprm train: interrupted; what was saved is kept\n"),
        ("train", signal.SIGTERM, 130, "rlprm train: interrupted; what was saved is kept\n"),
        ("train", ConfigError("no"), 1, "rlprm train: no\n"),
    ],
)  # fmt: skip
def test_exit_codes(
    command: str, error: BaseException | int, code: int, words: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from rlprm.cli import ablate, train

    def run(options: object) -> int:
        if isinstance(error, BaseException):
            raise error
        signal.raise_signal(error)
        return 0

    for module in (train, ablate):
        monkeypatch.setattr(module, "run", run)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main([command]) == code
    assert capsys.readouterr().err == words
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_cell_that_was_stopped_is_neither_finished_nor_failed(tmp_path: Path) -> None:
    from rlprm.cli.ablate import configuration
    from rlprm.config import TrainConfig, validated
    from rlprm.report.ablation import FAILED
    from rlprm.run.ablation import Planned, run_one

    made = configuration(["model.path=m"], "cell", 0, tmp_path, None)
    planned = Planned(cell="cell", seed=0, config=validated(TrainConfig, made.values), composed=made)

    def train(config: object, composed: object) -> Path:
        raise Stopped("stopped after step 2, which is saved")

    with pytest.raises(Stopped):
        run_one(planned, train, checkpoints="none")
    assert not planned.finished
    assert not (planned.folder / FAILED).exists()
