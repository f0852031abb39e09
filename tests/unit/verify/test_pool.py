from __future__ import annotations

import asyncio
import functools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest

from rlprm.errors import ConfigError, VerifierError
from rlprm.verify import pool as pool_module
from rlprm.verify.pool import VerifierPool, check_canaries, name_of

HERE = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def planted_on_path():
    """Workers import what their parent can: the planted verifier stands beside this file."""
    sys.path.insert(0, str(HERE))
    yield
    sys.path.remove(str(HERE))


def open_pool(workers: int = 1, timeout_s: float = 1.0, memory_mb: int = 512, verifier: object = "planted.verify"):
    return VerifierPool(verifier, workers=workers, timeout_s=timeout_s, memory_mb=memory_mb)


@pytest.fixture(scope="module")
def pool(planted_on_path):
    with open_pool(timeout_s=20.0) as shared:
        yield shared


def ask(pool: VerifierPool, response: str, gold: str = "7"):
    return pool.submit(gold, response, "").result(timeout=60)


def test_right_and_wrong(pool):
    assert [ask(pool, "7").outcome, ask(pool, "8").outcome] == [1.0, 0.0]
    assert ask(pool, "7").seconds < 5.0


@pytest.mark.parametrize(
    ("response", "kind", "reason"),
    [
        ("raise", "errors", "RuntimeError: planted"),
        ("sys.exit", "errors", "SystemExit: bye"),
        ("wide", "errors", "outcome 7.0; expected a number in [0, 1]"),
        ("nan", "errors", "outcome nan; expected a number in [0, 1]"),
        ("bare", "errors", "returned a float"),
        ("unjudgeable", "errors", "the judge declined"),
        ("exit", "crashes", "worker process died: exit status 3"),
        ("segv", "crashes", "worker process died: signal SIGSEGV"),
        ("eat", "memory", "memory limit reached"),
    ],
)
def test_failure_is_a_third_verdict_with_its_reason_and_the_next_job_is_judged(pool, response, kind, reason):
    before = pool.counts
    verdict = ask(pool, response)
    assert verdict.outcome is None
    assert reason in verdict.reason
    assert ask(pool, "7").outcome == 1.0
    after = pool.counts
    assert {
        name: after[name] - before[name] for name in after if name not in ("restarts",) and after[name] != before[name]
    } == {
        kind: 1,
        "judged": 1,
    }
    assert after["restarts"] - before["restarts"] == (kind in ("crashes", "memory"))


@pytest.mark.parametrize("response", ["sleep", "spin"])
def test_a_hanging_verifier_is_killed_on_time(response):
    with open_pool(timeout_s=0.5) as pool:
        victim = pool.pids()[0]
        verdict = ask(pool, response)
        assert (verdict.outcome, verdict.reason) == (None, "timeout after 0.5 s")
        assert 0.5 <= verdict.seconds < 1.5
        assert ask(pool, "7").outcome == 1.0
        assert victim not in pool.pids()
        assert not alive(victim)
        assert (pool.counts["timeouts"], pool.counts["judged"]) == (1, 1)


def test_a_worker_that_is_stopped_or_killed_from_outside_loses_no_job():
    with open_pool(timeout_s=0.5) as pool:
        os.kill(pool.pids()[0], signal.SIGSTOP)
        # Larger than any pipe buffer, so writing the job blocks too.
        assert ask(pool, "x" * 3_000_000).reason == "timeout after 0.5 s"
        assert ask(pool, "7").outcome == 1.0
        os.kill(pool.pids()[0], signal.SIGKILL)
        assert ask(pool, "7").reason == "worker process died: signal SIGKILL"
        assert ask(pool, "7").outcome == 1.0


def test_what_a_verifier_prints_is_not_taken_for_an_answer(pool):
    assert ask(pool, "print", gold="8").outcome == 0.0
    assert ask(pool, "stdin").reason == "''"
    assert ask(pool, "7").outcome == 1.0


@pytest.mark.parametrize(
    "text", ["", "４２ \u2028 \u0085 \n\r\x00", "\ud800 lone", "\U0001f600" * 1000, "x" * 2_000_000]
)
def test_any_text_arrives_unchanged(pool, text):
    assert ask(pool, text, gold=text).outcome == 1.0


def test_a_worker_starts_light_and_sees_no_secret(pool, monkeypatch):
    assert ask(pool, "modules").reason == ""
    monkeypatch.setenv("PLANTED_API_KEY", "secret")
    with open_pool() as fresh:
        assert "PLANTED_API_KEY" not in ask(fresh, "environ").reason


def test_step_labels_and_options_travel(pool):
    assert ask(pool, "steps").steps == (1, 0, -1)
    import planted

    with open_pool(verifier=functools.partial(planted.verify, bonus=0.25)) as generous:
        assert ask(generous, "8").outcome == 0.25


def test_200_quick_jobs_keep_their_order_and_none_is_lost():
    with open_pool(workers=2) as pool:
        jobs = [("1", str(number % 3), "") for number in range(200)]
        assert [v.outcome for v in pool.judge_many(jobs)] == [float(number % 3 == 1) for number in range(200)]
        assert [v.reason for v in pool.stream(jobs, window=7)] == [job[1] for job in jobs]
        assert pool.counts["judged"] == 400


def test_main_thread_other_thread_and_asyncio_get_equal_verdicts(pool):
    responses = ["7", "8", "raise", "exit", "steps", "7"]
    jobs = [("7", response, "") for response in responses]

    def bare(verdicts):
        return [(v.outcome, v.reason.partition("(after")[0], v.steps) for v in verdicts]

    here = bare(pool.judge_many(jobs))
    there: list[list] = []
    thread = threading.Thread(target=lambda: there.append(bare(pool.judge_many(jobs))))
    thread.start()
    thread.join(60)

    async def gather():
        return await asyncio.gather(*(asyncio.wrap_future(pool.submit(*job)) for job in jobs))

    assert here == there[0] == bare(asyncio.run(gather()))
    assert [outcome for outcome, _, _ in here] == [1.0, 0.0, None, None, 1.0, 1.0]


def test_close_answers_every_job_and_leaves_no_process():
    pool = open_pool(timeout_s=60.0)
    pids = pool.pids()
    futures: list[Future] = [pool.submit("7", response, "") for response in ("sleep", "7", "7")]
    while not futures[0].running():
        time.sleep(0.01)
    started = time.monotonic()
    pool.close()
    pool.close()
    assert time.monotonic() - started < 5.0
    assert [future.result(timeout=0).reason for future in futures] == [
        "the pool was closed while this job ran",
        "the pool was closed before this job ran",
        "the pool was closed before this job ran",
    ]
    assert (pool.counts["closed"], pool.pids()) == (3, [])
    assert not any(map(alive, pids))
    with pytest.raises(VerifierError, match="closed"):
        pool.submit("7", "7", "")


def test_the_end_of_a_worker_takes_its_own_children_along():
    with open_pool() as pool:
        grandchild = int(ask(pool, "grandchild").reason)
        assert alive(grandchild)
    assert gone(grandchild)


def test_workers_die_with_a_parent_that_is_killed():
    script = f"""
        import sys, time
        sys.path.insert(0, {str(HERE)!r})
        from rlprm.verify.pool import VerifierPool
        pool = VerifierPool("planted.verify", workers=1, timeout_s=600.0, memory_mb=512)
        pool.submit("7", "spin", "")
        time.sleep(0.2)
        print(pool.pids()[0], flush=True)
        time.sleep(600)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    try:
        worker = int(parent.stdout.readline())
        assert alive(worker)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    assert gone(worker)


def test_a_verifier_that_cannot_be_loaded_fails_at_once_and_by_name():
    for path, why in (("planted.absent", "absent"), ("no_such_module.verify", "ModuleNotFoundError")):
        with pytest.raises(VerifierError, match=f"(?s){path}.*{why}"):
            open_pool(verifier=path)
    with pytest.raises(VerifierError, match="cannot be loaded"):
        open_pool(memory_mb=8)


def test_limits_and_names_are_checked_before_any_process_starts():
    for bad in ({"workers": 0}, {"timeout_s": 0.0}, {"memory_mb": -1}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            open_pool(**bad)
    import planted

    for verifier in (
        lambda *_: 1.0,
        functools.partial(planted.verify, "7"),
        "verify",
        functools.partial(planted.verify, bonus={1}),
    ):
        with pytest.raises(ConfigError):
            name_of(verifier)


def test_a_wrong_canary_is_named(pool, monkeypatch):
    import planted

    assert check_canaries(pool) == 1
    monkeypatch.setattr(planted, "CANARIES", [("7", "7", 1.0), ("7", "8", 1.0)])
    with pytest.raises(VerifierError, match=r"gold='7', response='8' as 0.0 .*expected 1.0"):
        check_canaries(pool)


def test_a_worker_that_has_grown_is_replaced_before_it_fails_the_next_job(monkeypatch):
    # A worker holds some 15 MiB; with a limit of 20 MiB in the parent's eyes half of it is exceeded after each job.
    with open_pool() as pool:
        pool._memory_mb = 20
        first = pool.pids()
        assert ask(pool, "7").outcome == 1.0
        assert ask(pool, "7").outcome == 1.0
        assert pool.pids() != first
        assert pool.counts["restarts"] >= 1


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in ("Z", "X")  # a zombie has ended
    except FileNotFoundError:
        return False


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 10.0
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not alive(pid)


def test_every_kind_of_verdict_has_its_counter(pool):
    assert set(pool.counts) == {*pool_module.KINDS, "restarts"}
