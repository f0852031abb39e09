"""Programs, and their end."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from rlprm.launch import processes
from rlprm.launch.processes import Wishes, asked, end, start, wait

PATIENT = "import time; print('up', flush=True); time.sleep(60)"
DEAF = (
    "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)"
)


Program = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def program() -> Iterator[Program]:
    """Start Python code; with ``ready``, return when it has printed a line."""
    started = []

    def begin(code: str, ready: bool = True) -> subprocess.Popen[bytes]:
        process = start([sys.executable, "-c", code], environment={}, directory=None, output=subprocess.PIPE)
        started.append(process)
        if ready:
            assert process.stdout is not None
            process.stdout.readline()
        return process

    yield begin
    for process in started:
        assert process.stdout is not None
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_exit_code_passes_through_and_a_signal_is_what_the_shell_would_say(program: Program) -> None:
    assert wait(program("raise SystemExit(7)", ready=False), Wishes(), say=print, name="it") == 7
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"
    assert wait(program(killed, ready=False), Wishes(), say=print, name="it") == 143


def test_a_wish_is_handed_on_once_and_ends_with_the_shells_code(program: Program) -> None:
    wishes, said = Wishes(), []
    process = program(PATIENT)
    wishes.ask(signal.SIGINT, "somebody")
    assert wait(process, wishes, say=said.append, name="it") == 130
    assert said == ["it is asked to end (somebody)"]
    wishes.ask(signal.SIGINT, "somebody")
    assert wait(program(PATIENT), wishes, say=said.append, name="it", asking="never") == 130
    assert said[1:] == ["it is to end at once (asked twice)"]


SAYS = (
    "import os, signal, time\n"
    "def told(number, frame):\n"
    "    os.write(1, b'%d\\n' % number)\n"  # not print: this may come in the middle of one
    "    if number == {end}: os._exit({code})\n"
    "signal.signal(signal.SIGTERM, told); signal.signal(signal.SIGINT, told)\n"
    "print('up', flush=True); time.sleep(60); time.sleep(60)"
)


def heard(process: subprocess.Popen[bytes]) -> list[int]:
    assert process.stdout is not None
    return [int(line) for line in process.stdout]


def test_first_a_run_may_save_then_it_is_interrupted(program: Program) -> None:
    """Whoever asks once gets SIGTERM across, and SIGINT follows when the grace is over, or at the second wish."""
    wishes, said = Wishes(), []
    process = program(SAYS.format(end=int(signal.SIGINT), code=130))
    wishes.ask(signal.SIGINT, "rlprm stop")
    assert wait(process, wishes, say=said.append, name="the run", grace_s=0.4) == 130
    assert heard(process) == [signal.SIGTERM, signal.SIGINT]
    assert said == [
        "the run is asked to end (rlprm stop)", "the run is to end at once (it has not ended within 0 s)",
    ]  # fmt: skip
    again, told = Wishes(), []
    process = program(SAYS.format(end=int(signal.SIGINT), code=130))
    again.ask(signal.SIGINT, "SIGINT")
    threading.Timer(0.5, again.ask, (signal.SIGINT, "")).start()
    assert wait(process, again, say=told.append, name="the run", asking=asked("train")) == 130
    assert heard(process) == [signal.SIGTERM, signal.SIGINT]
    assert told == [
        "asked the run to finish its step and save; Ctrl-C again ends it at once", "the run is to end at once (asked twice)"
    ]  # fmt: skip


def test_without_a_grace_it_begins_with_the_interrupt_and_a_head_gets_the_wish_as_it_came(program: Program) -> None:
    wishes = Wishes()
    wishes.ask(signal.SIGTERM, "SIGTERM")
    process = program(SAYS.format(end=int(signal.SIGINT), code=130))
    assert wait(process, wishes, say=print, name="the preflight", grace_s=0.0) == 143
    assert heard(process) == [signal.SIGINT]
    interrupted = Wishes()
    interrupted.ask(signal.SIGINT, "SIGINT")
    process = program(SAYS.format(end=int(signal.SIGINT), code=130))
    assert wait(process, interrupted, say=print, name="the launch", by=None) == 130
    assert heard(process) == [signal.SIGINT]


def test_an_error_while_it_saves_is_not_taken_for_the_end_that_was_asked_for(program: Program) -> None:
    wishes = Wishes()
    process = program(SAYS.format(end=int(signal.SIGTERM), code=1))
    wishes.ask(signal.SIGINT, "somebody")
    assert wait(process, wishes, say=print, name="the run") == 1


def test_a_program_that_has_ended_is_left_alone(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number may be another's by now."""
    process = program("pass", ready=False)
    process.wait()
    monkeypatch.setattr(processes, "tree", lambda root: pytest.fail("looked below a number that is free"))
    end(process, 1.0)


def test_a_run_that_succeeds_although_it_was_asked_to_end_has_succeeded(program: Program) -> None:
    wishes = Wishes()
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); print(1, flush=True); time.sleep(60)"
    process = program(code)
    wishes.ask(signal.SIGINT, "somebody")
    assert wait(process, wishes, say=print, name="it") == 0


@pytest.mark.parametrize("twice", [True, False])
def test_who_does_not_end_is_killed_at_the_second_wish_or_after_its_time(program: Program, twice: bool) -> None:
    wishes, said = Wishes(), []
    process = program(DEAF + "; print('up', flush=True); time.sleep(60)")
    wishes.ask(signal.SIGINT, "somebody")
    if twice:
        wishes.ask(signal.SIGINT, "somebody")
    began = time.monotonic()
    assert wait(process, wishes, say=said.append, name="it", grace_s=60.0 if twice else 0.3, kill_s=0.3) == 130
    assert time.monotonic() - began < 5
    assert said[-2].startswith("it is to end at once (" + ("asked twice" if twice else "it has not ended"))
    assert said[-1].startswith("it is killed: it has not ended within 0 s")


def test_what_a_program_has_started_ends_with_it(program: Program) -> None:
    inner = (
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {PATIENT!r}]); "
        "print(p.pid, flush=True); p.wait()"
    )
    process = program(inner, ready=False)
    assert process.stdout is not None
    lines = {process.stdout.readline().strip(), process.stdout.readline().strip()}
    (grandchild,) = (int(line) for line in lines if line.isdigit())
    end(process, 5.0)
    assert process.returncode is not None
    assert not psutil.pid_exists(grandchild)


def test_wishes_come_from_the_stop_file_and_from_the_lifeline(tmp_path: Path) -> None:
    wishes = Wishes(folder=tmp_path)
    assert not wishes.check()
    (tmp_path / "stop").touch()
    assert wishes.check()
    assert (wishes.asked, wishes.why, wishes.hard) == (signal.SIGINT, "rlprm stop", False)
    for text, why, hard in (
        ("", "the connection to the launcher is gone", False),
        ("stop\n", "the launcher asks for it", False),
        ("stop\nstop\n", "the launcher asks for it", True),
        ("noise\n", "the connection to the launcher is gone", False),
    ):
        listening = Wishes()
        (tmp_path / "lines").write_text(text)
        with (tmp_path / "lines").open() as stream:
            listening._read(stream)
        assert (listening.why, listening.hard) == (why, hard)
        assert listening.code() == 130


def test_a_program_that_is_bound_ends_when_its_parent_is_killed(program: Program) -> None:
    child = f"from rlprm.launch.processes import bind_to_parent; bind_to_parent(); {PATIENT}"
    parent = (
        "import os, subprocess, sys; from rlprm.launch.processes import bound; "
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}], env=bound(os.environ), stdout=subprocess.PIPE); "
        "p.stdout.readline(); print(p.pid, flush=True); p.wait()"
    )
    process = program(parent, ready=False)
    assert process.stdout is not None
    grandchild = psutil.Process(int(process.stdout.readline()))
    process.kill()
    process.wait()
    psutil.wait_procs([grandchild], timeout=5)
    assert not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE


def test_the_tail_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("\n".join(map(str, range(100))))
    assert processes.tail(log, 2) == "98\n99"
    assert processes.tail(tmp_path / "none") == "(no log)"
