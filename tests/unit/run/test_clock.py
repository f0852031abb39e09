from __future__ import annotations

import threading

import pytest

from rlprm.run.clock import Clock


class Now:
    """A clock that is set by hand, in seconds."""

    def __init__(self):
        self.time = 100.0

    def __call__(self):
        return self.time


def test_stages_nest_and_repeat():
    now = Now()
    clock = Clock(now)
    with clock.stage("step"):
        for _ in range(2):
            with clock.stage("sample"):
                now.time += 3.0
                with clock.stage("judge"):
                    now.time += 1.0
        now.time += 2.0
    # sample: 2 x (3 + 1), judge: 2 x 1, step: 2 x 4 + 2
    assert clock.collect() == {"timing_s/judge": 2.0, "timing_s/sample": 8.0, "timing_s/step": 10.0}
    assert clock.collect() == {}


def test_a_stage_that_raises_is_counted():
    now = Now()
    clock = Clock(now)
    with pytest.raises(KeyError), clock.stage("sample"):
        now.time += 5.0
        raise KeyError
    assert clock.collect() == {"timing_s/sample": 5.0}


def test_an_open_stage_counts_when_it_ends():
    now = Now()
    clock = Clock(now)
    with clock.stage("save"):
        now.time += 1.0
        assert clock.collect() == {}
    assert clock.collect() == {"timing_s/save": 1.0}


def test_threads_lose_nothing():
    clock = Clock()

    def work():
        for _ in range(2000):
            clock.add("judge", 1.0)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clock.collect() == {"timing_s/judge": 8000.0}
