"""The learner on one rank, in this process."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlprm.engine import distributed
from rlprm.engine.learner import Learner, Outputs
from rlprm.engine.model import load_causal, load_value
from rlprm.engine.optimizer import LearnerSettings
from rlprm.engine.scoring import Frozen
from rlprm.errors import AlignmentError, ConfigError, NonFinite
from rlprm.records import MicroBatch
from tests.integration import learner_program as program
from tests.integration import tiny_models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.folder(tmp_path_factory.mktemp("learner"), 0, True)


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    distributed.join(0, 1, "127.0.0.1", port)
    yield
    distributed.leave()


def causal(folder: str) -> torch.nn.Module:
    return load_causal(folder, "float32", attention="sdpa", gradient_checkpointing=False)


def make(folder: str, **changes: Any) -> Learner:
    return Learner(causal(folder), replace(program.SETTINGS, **changes))


@pytest.mark.usefixtures("group")
def test_scores_do_not_depend_on_layout_or_budget(folder: str) -> None:
    data = program.corpus()
    scored = [
        make(folder, layout=layout, token_budget=budget).logprobs_and_entropy(data, 0.6)
        for layout, budget in (("padded", 1), ("padded", 1000), ("packed", 20), ("packed", 1000))
    ]
    frozen = Frozen(causal(folder), token_budget=30, layout="packed", device="cpu")
    scored.append(frozen.logprobs_and_entropy(data, 0.6))
    assert (scored[0][0][data.response] < 0).all()
    assert not scored[0][0][~data.response].any()
    for logprobs, entropy in scored[1:]:
        assert torch.allclose(logprobs, scored[0][0], atol=1e-6, rtol=1e-6)
        assert torch.allclose(entropy, scored[0][1], atol=1e-6, rtol=1e-6)
    assert torch.equal(frozen.logprobs(data, 0.6), scored[-1][0])


@pytest.mark.usefixtures("group")
def test_weights_follow_adamw_by_hand(folder: str) -> None:
    # First AdamW step: m = (1-b1) g and v = (1-b2) g^2, both bias-corrected to g and g^2, so the step is
    # lr g / (|g| + eps) whatever the size of the gradient, and a matrix (not a bias) shrinks by lr * weight_decay.
    subject = make(folder, lr=1e-2, weight_decay=0.5, warmup=2)
    before = program.weights(subject)
    parts = program.micros(program.corpus(), list(range(6)), budget=30, layout="padded")
    metrics = subject.update(parts, program.objective(100), temperature=0.7, entropy=True)
    after = program.weights(subject)
    assert metrics["lr"] == 5e-3
    assert subject.steps == 1
    bias = "model.layers.0.self_attn.q_proj.bias"
    moved = (after[bias] - before[bias]).abs()
    assert torch.allclose(moved[moved > 1e-4], torch.tensor(5e-3), rtol=1e-2)
    matrix = "model.layers.1.mlp.down_proj.weight"
    moved = (after[matrix] - before[matrix] * (1 - 5e-3 * 0.5)).abs()
    assert torch.allclose(moved.median(), torch.tensor(5e-3), rtol=1e-2)


@pytest.mark.usefixtures("group")
def test_clipping_bounds_the_step_and_reports_the_norm_before_it(folder: str) -> None:
    parts = program.micros(program.corpus(), list(range(6)), budget=30, layout="padded")
    free, clipped = (
        (subject := make(folder, **{**vars_of(program.PROBE), "max_grad_norm": bound}), program.weights(subject))
        for bound in (1e9, 0.1)
    )
    norms, moves = [], []
    for subject, before in (free, clipped):
        norms.append(subject.update(parts, program.objective(100), temperature=0.7, entropy=True)["grad_norm"])
        after = program.weights(subject)
        moves.append(sum(float((after[k] - before[k]).double().square().sum()) for k in before) ** 0.5 / program.GAIN)
    assert norms[0] == norms[1] > 0.1
    assert moves == [pytest.approx(norms[0], rel=1e-4), pytest.approx(0.1, rel=1e-4)]


def vars_of(settings: LearnerSettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in ("lr", "eps", "betas", "weight_decay", "max_grad_norm")}


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_refused_step_leaves_the_next_one_as_it_was(folder: str, where: str) -> None:
    parts = program.micros(program.corpus(), list(range(6)), budget=30, layout="padded")

    def poisoned(micro: MicroBatch, outputs: Outputs) -> tuple[Tensor, dict[str, Any]]:
        assert outputs.logprobs is not None
        if where == "loss":
            return outputs.logprobs.sum() * float("nan"), {}
        # a finite loss of infinite slope: d sqrt(x)/dx at x = 0
        return ((outputs.logprobs - outputs.logprobs.detach()).square().sum()).sqrt(), {}

    one, other = make(folder), make(folder)
    for subject in (one, other):
        subject.update(parts, program.objective(100), entropy=True)
    with pytest.raises(
        NonFinite, match="step 2 was not taken: " + ("rank 0: the loss" if where == "loss" else "the g")
    ):
        one.update(parts, poisoned)
    results = [subject.update(parts, program.objective(100), entropy=True) for subject in (one, other)]
    assert results[0] == results[1]
    left, right = program.weights(one), program.weights(other)
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.usefixtures("group")
def test_a_value_model_learns_its_targets(folder: str) -> None:
    model = load_value(folder, "float32", attention="sdpa", gradient_checkpointing=False)
    subject = Learner(model, replace(program.SETTINGS, lr=3e-3))
    data = program.corpus()
    parts = program.micros(data, list(range(6)), budget=30, layout="packed")

    def error(micro: MicroBatch, outputs: Outputs) -> tuple[Tensor, dict[str, Any]]:
        assert outputs.values is not None
        wrong = (outputs.values - 1.0).square() * micro.response_mask
        return wrong.sum() / int(data.response.sum()), {}

    assert not subject.values(data).any()
    for _ in range(20):
        subject.update(parts, error)
    values = subject.values(data)[data.response]
    assert float((values - 1).square().mean()) < 0.1
    with pytest.raises(ConfigError, match=r"values\(\) of a causal"):
        make(folder).values(data)


@pytest.mark.usefixtures("group")
def test_nothing_to_learn_from_and_unknown_names_are_errors(folder: str) -> None:
    subject = make(folder)
    with pytest.raises(AlignmentError, match="without a micro-batch on any rank"):
        subject.update([], program.objective(1))
    with pytest.raises(ConfigError, match=r"no weight 'lm_head.weight' \(1 unknown\)"):
        list(subject.named_weights(["lm_head.weight"]))
    assert [name for name, _ in subject.named_weights(["model.norm.weight"])] == ["model.norm.weight"]
    with pytest.raises(ConfigError, match="holds no tokenizer files"):
        subject.export("unused", folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offload": "cpu"}, "host memory already"),
        ({"offload": "cpu", "device": "cuda"}, "with zero_stage=0"),
        ({"zero_stage": 4}, "expected 0, 1, 2 or 3"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"schedule": "linear"}, "needs a total"),
    ],
)
def test_settings_that_cannot_run_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(program.SETTINGS, **changes)
