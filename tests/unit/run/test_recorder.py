"""What a step leaves behind, from hand-made rows; names are those of the table."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rlprm.batch import Batch, Row
from rlprm.core.metrics import check_name
from rlprm.run.recorder import Recorder, lengths, selected, staleness, texts


def row(**changes) -> Row:
    given = {
        "group": 0, "prompt_id": "a/0", "source": "a", "sample": 0, "outcome": 1.0, "reason": "", "finish": "stop",
        "prompt_length": 3, "response_length": 4, "num_steps": 2, "version": 5, "repetition": 0.0,
        "copy": False, "fresh": True, "train": True,
    }  # fmt: skip
    return Row(**{**given, **changes})


ROWS = (
    row(),
    row(response_length=8, num_steps=1, finish="length", outcome=0.0, version=4, repetition=0.5),
    row(prompt_length=6, response_length=0, num_steps=0, outcome=None, train=False),
    row(outcome=0.0, fresh=False),
)


def test_lengths_by_hand():
    assert lengths(ROWS) == {
        "response_length/mean": 4.0,
        "response_length/max": 8.0,
        "response_length/min": 0.0,
        "response_length/clip_ratio": 0.25,
        "response_length/clip_ratio_right": 0.0,  # the cut one is wrong
        "process_steps/mean": 1.25,
        "process_steps/max": 2.0,
        "process_steps/frac_single": 0.25,
        "process_steps/tokens": 3.2,  # 16 tokens in 5 steps
        "prompt_length/mean": 3.75,
        "prompt_length/max": 6.0,
        "prompt_length/min": 3.0,
    }


def test_repetition_and_copies_by_hand():
    rows = (*ROWS, row(repetition=0.3, copy=True))
    assert texts(rows) == {
        "response_text/repetition_mean": pytest.approx(0.16),  # (0.5 + 0.3) / 5
        "response_text/repetition_max": 0.5,
        "response_text/repetition_right": pytest.approx(0.15),  # rows 0 and 4
        "response_text/copies": 0.2,
    }


def test_without_a_right_response_or_a_step_there_is_nothing_to_say_of_them():
    rows = (row(outcome=0.0, num_steps=0, response_length=0), row(outcome=None, num_steps=0, response_length=0))
    assert not {"response_length/clip_ratio_right", "process_steps/tokens"} & set(lengths(rows))
    assert "response_text/repetition_right" not in texts(rows)


def test_staleness_is_the_version_at_training_minus_that_of_the_sample():
    assert staleness(ROWS, 5.0) == {"staleness/mean": 0.25, "staleness/max": 1.0}


def kept(chosen: tuple[bool, ...] = (True, False, False, True)) -> Batch:
    return Batch(
        step=1, rows=ROWS, shards=(), texts=(), members=(), selected=chosen, counts={"keep/rollouts_sampled": 4.0}
    )


def test_selection_counts_accepted_rows_and_fresh_accuracy_counts_judged_ones():
    assert selected(kept()) == {
        "select/rows_in": 3.0,
        "select/rows_out": 2.0,
        "select/frac_kept": pytest.approx(2 / 3),
        "keep/outcome_mean_fresh": 0.5,  # rows 1 and 2: fresh and judged
    }


class Trackers:
    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.read: list[tuple[int, list]] = []
        self.closed = False

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.logged.append((step, dict(metrics)))

    def rollouts(self, step: int, readable: list) -> None:
        self.read.append((step, readable))

    def close(self) -> None:
        self.closed = True


ENGINES = {"rollout/engines": 2.0, "rollout/engines_lost": 0.0, "rollout/engines_joined": 0.0}


def recorder(**changes):
    trackers, lines = Trackers(), []
    timings = iter([{"timing_s/step": 2.0}, {"timing_s/testing": 1.0}] * 4)
    settings = {
        "trackers": trackers,
        "clock": SimpleNamespace(collect=lambda: next(timings)),
        "transfer": SimpleNamespace(metrics={"weights/version": 6.0}),
        "prompts": SimpleNamespace(metrics=lambda: {"data/a/epoch": 0.5}),
        "rollouts": SimpleNamespace(take_metrics=lambda: {**ENGINES, "keep/aborted": 2.0}),
        "alarms": SimpleNamespace(check=lambda step, metrics: {"alarm/length": float(metrics["staleness/max"] > step)}),
        "rollouts_total": 10.0,
        "tokens_total": 100.0,
        "version": 5.0,
        "restarts": 1.0,
        "progress": lines.append,
        **changes,
    }
    return Recorder(**settings), trackers, lines


SCORED = SimpleNamespace(metrics={"prm/auc_fresh": 0.75, "prm/auc_surprisal": 0.5})
PROVED = {"rollouts": 6.0, "tokens": 90.0, "frac_absent": 0.0, "seconds": 1.5}
CREDIT = SimpleNamespace(result=lambda: ({"adv/outcome/share": 1.0}, ["a response"]))


def test_a_step_gathers_every_number_under_a_listed_name():
    made, trackers, lines = recorder()
    made.record(3, kept(), SCORED, CREDIT, [{"prm/loss": 0.6}, {"actor/pg_loss": -0.1}])
    assert trackers.logged == []  # an evaluation may still belong to this step
    made.flush()
    ((step, metrics),) = trackers.logged
    assert step == 3
    for name in metrics:
        check_name(name)
    assert metrics["prm/loss"] == 0.6
    assert metrics["actor/pg_loss"] == -0.1
    assert metrics["adv/outcome/share"] == 1.0
    assert metrics["keep/aborted"] == 2.0
    assert metrics["alarm/length"] == 0.0  # the alarms have seen the step and its metrics
    assert metrics["training/global_step"] == 3.0
    assert metrics["training/rollouts_total"] == 14.0
    assert metrics["timing_s/step"] == 2.0
    assert metrics["timing_s/testing"] == 1.0
    assert metrics["perf/total_num_tokens"] == 31.0  # 15 of prompts, 16 of responses
    assert metrics["perf/throughput"] == 15.5
    assert metrics["perf/cpu_memory_used_gb"] > 0
    assert metrics["staleness/max"] == 1.0  # against version 5, which sampled
    assert trackers.read == [(3, ["a response"])]
    assert lines == ["sampled accuracy 0.50, PRM AUC 0.75 (surprisal 0.50)"]


def test_the_next_step_is_measured_against_the_published_version_and_goes_on_counting():
    made, trackers, _ = recorder(clock=SimpleNamespace(collect=lambda: {"timing_s/step": 2.0}))
    made.record(3, kept(), SCORED, CREDIT, [])
    made.record(4, kept(), SCORED, CREDIT, [])
    assert made.version == 6.0
    assert made.rollouts_total == 18.0
    assert [step for step, _ in trackers.logged] == [3]  # the earlier step is written when the next one comes


@pytest.mark.parametrize("streams", [("",), ("process/", "other/")])
def test_what_provers_sample_counts_as_rollouts(streams):
    made, trackers, _ = recorder()
    own = {f"prover/{stream}{name}": value for stream in streams for name, value in PROVED.items()}
    made.record(1, kept(), SimpleNamespace(metrics=own), CREDIT, [])
    made.flush()
    ((_, metrics),) = trackers.logged
    assert metrics["training/rollouts_total"] == 10.0 + 4.0 + 6.0 * len(streams)  # before, sampled, by each prover
    assert made.rollouts_total == metrics["training/rollouts_total"]  # what a checkpoint keeps
    assert metrics["keep/rollouts_sampled"] == 4.0
    for name in metrics:
        check_name(name)


def test_an_evaluation_joins_its_step():
    made, trackers, _ = recorder()
    made.evaluation(0, {"val-core/a/accuracy/greedy": 0.2})  # before training: a line of its own
    made.record(1, kept(), SCORED, CREDIT, [])
    made.evaluation(1, {"val-core/a/accuracy/greedy": 0.4})
    made.close()
    assert [step for step, _ in trackers.logged] == [0, 1]
    assert trackers.logged[0][1]["val-core/a/accuracy/greedy"] == 0.2
    assert trackers.logged[1][1]["val-core/a/accuracy/greedy"] == 0.4
    assert trackers.logged[1][1]["training/global_step"] == 1.0
    assert trackers.closed


def test_the_line_tells_of_engines_that_came_or_went():
    changed = {**ENGINES, "rollout/engines": 1.0, "rollout/engines_lost": 1.0}
    made, trackers, lines = recorder(rollouts=SimpleNamespace(take_metrics=lambda: changed))
    made.record(1, kept(), SimpleNamespace(metrics={}), CREDIT, [])
    made.flush()
    assert lines == ["sampled accuracy 0.50, 1 rollout engines (1 lost, 0 joined)"]
    assert trackers.logged[0][1]["rollout/engines_lost"] == 1.0


def test_without_a_prm_the_line_speaks_of_accuracy_only():
    made, _, lines = recorder()
    made.record(1, kept(), SimpleNamespace(metrics={}), CREDIT, [])
    assert lines == ["sampled accuracy 0.50"]
