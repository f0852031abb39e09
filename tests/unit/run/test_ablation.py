from __future__ import annotations

import json
import pickle
import subprocess
from concurrent.futures import CancelledError

import jinja2
import psutil
import pytest
import ray.exceptions
import torch.distributed
import yaml
from safetensors import SafetensorError

from rlprm.cli.ablate import configuration
from rlprm.config import TrainConfig, validated
from rlprm.errors import NonFinite
from rlprm.run.ablation import AblationConfig, Planned, in_order, run_one
from rlprm.run.kept import _fits, learner_key, ray_needs, sampling_key


def planned(tmp_path, cell="a", seed=0, *words):
    made = configuration(["recipe=chain_arithmetic_cpu", *words], cell, seed, tmp_path / "abl", None)
    return Planned(cell=cell, seed=seed, config=validated(TrainConfig, made.values), composed=made)


def trained(run):
    """What a run leaves behind."""
    (run.folder / "checkpoints" / "step_000001").mkdir(parents=True)
    (run.folder / "metrics.jsonl").write_text("{}\n")
    return run.folder


def test_a_run_that_ends_is_marked_and_its_checkpoints_go(tmp_path):
    run = planned(tmp_path)
    assert not run.finished
    assert run_one(run, lambda config, made: trained(run), checkpoints="none") is None
    assert run.finished
    assert run.folder == tmp_path / "abl" / "a" / "seed0"
    assert not (run.folder / "checkpoints").exists()
    assert (run.folder / "metrics.jsonl").exists()
    kept = planned(tmp_path, "b")
    run_one(kept, lambda config, made: trained(kept), checkpoints="last")
    assert (kept.folder / "checkpoints" / "step_000001").is_dir()


def test_a_run_that_fails_is_written_down_and_may_be_tried_again(tmp_path):
    run = planned(tmp_path)

    def fails(config, made):
        trained(run)
        raise NonFinite("the loss is not finite")

    assert run_one(run, fails, checkpoints="none") == "the loss is not finite"
    assert not run.finished
    assert (run.folder / "checkpoints").is_dir()  # it can go on from there
    failed = json.loads((run.folder / "failed.json").read_text())
    assert (failed["error"], failed["traceback"]) == ("the loss is not finite", "")
    assert run_one(run, lambda config, made: run.folder, checkpoints="none") is None
    assert run.finished
    assert not (run.folder / "failed.json").exists()


def test_a_mistake_of_the_program_is_kept_with_its_traceback(tmp_path):
    run = planned(tmp_path)
    assert run_one(run, lambda config, made: {}["x"], checkpoints="none") == "KeyError: 'x'"
    assert "in <lambda>" in json.loads((run.folder / "failed.json").read_text())["traceback"]


@pytest.mark.parametrize(
    "error",
    [
        *(torch.OutOfMemoryError("of a GPU"), torch.distributed.DistBackendError("NCCL"), torch.linalg.LinAlgError()),
        *(ray.exceptions.GetTimeoutError("late"), ray.exceptions.OutOfMemoryError("of a node")),
        *(OSError(28, "No space left on device"), MemoryError(), EOFError(), SyntaxError("user's own file")),
        *(pickle.UnpicklingError("cut"), subprocess.CalledProcessError(1, "cc"), CancelledError()),
        *(yaml.YAMLError(), jinja2.TemplateSyntaxError("", 1), SafetensorError("cut"), psutil.NoSuchProcess(1)),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_libraries_raise_ends_one_run(tmp_path, error):
    def fails(config, made):
        raise error

    assert run_one(planned(tmp_path), fails, checkpoints="none").startswith(type(error).__name__)


def test_a_full_disk_ends_one_run_and_its_error_is_still_said(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rlprm.run.ablation.write_json", full)
    run = planned(tmp_path)
    assert "No space left" in run_one(run, lambda config, made: trained(run), checkpoints="none")
    assert not run.finished


def test_ctrl_c_ends_everything_and_marks_nothing(tmp_path):
    run = planned(tmp_path)

    def interrupted(config, made):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_one(run, interrupted, checkpoints="none")
    assert not run.finished
    assert not (run.folder / "failed.json").exists()


def test_runs_with_the_same_engines_stand_together_seed_by_seed(tmp_path):
    runs = [
        planned(tmp_path, cell, seed, *words)
        for cell, words in (("a", ()), ("long", ("max_response_tokens=64",)), ("b", ("policy.lr=1e-3",)))
        for seed in (0, 1)
    ]
    order = [(run.cell, run.seed) for run in in_order(runs, sampling_key)]
    assert order == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("long", 0), ("long", 1)]


@pytest.mark.parametrize(
    ("words", "same_engines", "same_learners"),
    [
        (("method=outcome_rloo", "temperature=0.7", "policy.zero_stage=2"), True, True),
        (("responses_per_prompt=2", "evaluation.every=0", "steps=9"), True, True),
        (("max_response_tokens=64",), False, True),
        (("splitter=whole",), False, True),
        (("verifier.timeout_s=9.0",), False, True),
        (("keep=accuracy_band",), False, True),
        (("rollout.engine.max_num_seqs=7",), False, True),
        (("model.dtype=bfloat16",), False, True),
        (("placement.threads=2",), False, False),
        (("placement=cpu_two_ranks",), False, False),
    ],
)
def test_what_engines_and_learner_processes_depend_on(tmp_path, words, same_engines, same_learners):
    first, second = planned(tmp_path).config, planned(tmp_path, "a", 1, *words).config
    assert (sampling_key(first) == sampling_key(second)) == same_engines
    assert (learner_key(first) == learner_key(second)) == same_learners


def test_a_standing_ray_serves_what_needs_no_more_of_it(tmp_path):
    one, two = (ray_needs(planned(tmp_path, "a", 0, *words).config) for words in ((), ("placement.engines=2",)))
    assert _fits(one, two)
    assert not _fits(two, one)
    assert not _fits({**one, "store": 1}, one)
    assert _fits({**two, "address": "auto"}, {**one, "address": "auto"})  # a cluster has what it has


def test_seeds_are_a_count_or_a_list():
    values = {
        "name": "x", "stream": "process", "level": None, "confidence": 0.95, "resamples": 10, "last_steps": 1,
        "collapse": {"share_of_best": 0.5, "entropy": 0.0}, "checkpoints": "none",
    }  # fmt: skip
    assert validated(AblationConfig, {**values, "seeds": 3}).seed_list() == [0, 1, 2]
    assert validated(AblationConfig, {**values, "seeds": [7, 3]}).seed_list() == [7, 3]
