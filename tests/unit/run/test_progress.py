from __future__ import annotations

import io
import threading
import time

import pytest
from rich.console import Console

from rlprm.run.progress import Progress, Stage, duration


def console(*, terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=160)


def wait_for(text, out):
    deadline = time.monotonic() + 10
    while text not in out.file.getvalue():
        assert time.monotonic() < deadline, f"{text!r} never came: {out.file.getvalue()!r}"
        time.sleep(0.005)


def test_the_line_says_what_how_far_and_how_long():
    now = [0.0]
    stage = Stage("sample", 32, "prompts", 0, lambda: now[0])
    assert stage.remaining is None
    stage.advance(8, note="round 2")
    now[0] = 4.0
    # 8 in 4 s leaves 24 at 0.5 s each
    assert stage.line() == "sample: 8 of 32 prompts, 4 s, about 12 s to go, round 2"


def test_what_was_done_before_a_resume_does_not_quicken_the_pace():
    now = [0.0]
    stage = Stage("train", 30, "steps", 20, lambda: now[0])
    stage.advance()
    now[0] = 6.0
    assert stage.line() == "train: 21 of 30 steps, 6 s, about 54 s to go"


def test_without_a_total_the_line_counts():
    stage = Stage("start engines", None, "", 0, lambda: 0.0)
    assert stage.line() == "start engines: 0 s"
    stage.advance(3)
    assert stage.line() == "start engines: 3, 0 s"


def test_off_a_terminal_a_stage_that_lasts_speaks_by_itself():
    out = console(terminal=False)
    with Progress(out, every=0.01, patience=0.01).stage("start engines"):
        wait_for("start engines", out)
    assert "\x1b" not in out.file.getvalue()
    assert "progress: start engines" not in [thread.name for thread in threading.enumerate()]


def test_off_a_terminal_a_short_stage_is_not_mentioned():
    out = console(terminal=False)
    with Progress(out, patience=5.0).stage("sample", total=3) as stage:
        stage.advance(3)
    assert out.file.getvalue() == ""


def test_on_a_terminal_stages_nest_and_leave_nothing_behind():
    out = console(terminal=True)
    progress = Progress(out)
    with progress.stage("train", total=2, unit="steps") as train:
        with progress.stage("sample", total=32, unit="prompts", done=8) as sample:
            sample.advance(8, note="round 1")
        train.advance()
        progress._live.refresh()
        assert "train" in out.file.getvalue()
    assert progress._live is None


def test_the_terminal_comes_back_after_an_error():
    out = console(terminal=True)
    progress = Progress(out)
    with pytest.raises(KeyError), progress.stage("train"):
        raise KeyError
    assert progress._live is None
    # the cursor is shown again
    assert out.file.getvalue().rstrip().rfind("\x1b[?25h") > out.file.getvalue().rfind("\x1b[?25l")


def test_quiet_says_nothing():
    out = console(terminal=True)
    progress = Progress(out, quiet=True)
    with progress.stage("train", total=2) as stage:
        stage.advance()
        progress.say("hello")
    assert out.file.getvalue() == ""


def test_durations_round_to_what_people_say():
    assert [duration(value) for value in (0.4, 59.6, 119.7, 3599.9)] == [
        "0 s",
        "1 min 00 s",
        "2 min 00 s",
        "1 h 00 min",
    ]
