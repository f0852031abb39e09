"""The cross-entropy of step labels: where logits are read, what is divided by, and what a source reads afterwards."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch

from rlprm.core.reduce import Identity
from rlprm.data.labelled import Labelled
from rlprm.engine.batching import micros
from rlprm.engine.combine import global_numbers
from rlprm.engine.learner import Outputs
from rlprm.engine.model import load_value, response_values
from rlprm.engine.offline import Turns
from rlprm.engine.step_labels import StepExample, StepLabels, label_cross_entropy, laid_out
from rlprm.run.prm_training import written
from rlprm.sources.prm_formats import Separated
from tests.unit.engine import tiny_prm
from tests.unit.made import TableLearner

# Tokens are ids of a table: the value "before" token n is what the table says of n, so the number at a position is the
# table's entry of the token behind it. Steps end at 2 and 4 (right, wrong), and at 6 (unknown) and 7 (right; the added 0).
EXAMPLES = [
    StepExample(tokens=(1, 2, 3, 4, 5), positions=(1, 3), labels=(1, 0)),
    StepExample(tokens=(6, 6, 7), positions=(1, 2), labels=(-1, 1)),
]
TABLE = [9.0, 9.0, 0.5, 9.0, -1.0, 9.0, 2.0]  # of ids 1 to 7; id 0, the added token, has 0


def learner(examples=EXAMPLES, held_out=(), *, token_budget=64, layout="padded", batch_size=2):
    table = TableLearner(TABLE)
    turns = Turns(
        batch_size=batch_size, seed=0, token_budget=token_budget, layout=layout, rank=0, world_size=1,
        reduce=Identity(), tokenizer_path="",
    )  # fmt: skip
    made = StepLabels(table, examples, list(held_out), turns)
    return made, table


# -log sigma(0.5) = 0.474077 (right), -log(1 - sigma(-1)) = 0.313262 (wrong), -log sigma(0) = 0.693147 (right): mean of three
LOSS = (0.474077 + 0.313262 + 0.693147) / 3


def test_loss_is_the_mean_over_labelled_steps():
    assert pytest.approx((math.log1p(math.exp(-0.5)) + math.log1p(math.exp(-1)) + math.log(2)) / 3, abs=1e-6) == LOSS
    made, table = learner()
    table.settings = type("Settings", (), {"total_steps": 9})
    found = global_numbers([made.advance(1)])
    assert found["prm/loss"] == pytest.approx(LOSS, abs=1e-6)
    assert found["prm/label_mean"] == pytest.approx(2 / 3)
    assert "prm/step_auc" not in found


@pytest.mark.parametrize(("token_budget", "layout"), [(1, "padded"), (4, "packed"), (64, "packed")])
def test_the_split_into_micro_batches_leaves_no_trace(token_budget: int, layout: str):
    made, table = learner(token_budget=token_budget, layout=layout)
    table.settings = type("Settings", (), {"total_steps": 9})
    assert global_numbers([made.advance(1)])["prm/loss"] == pytest.approx(LOSS, abs=1e-6)


def test_held_out_steps_are_measured_at_the_end():
    made, table = learner(held_out=EXAMPLES)
    table.settings = type("Settings", (), {"total_steps": 2})
    assert "prm/step_auc" not in global_numbers([made.advance(1)])
    # right 0.5 and 0, wrong -1: both pairs in order
    assert global_numbers([made.advance(1)])["prm/step_auc"] == 1.0


def test_labels_of_one_kind_give_no_auc():
    made, _ = learner(held_out=[StepExample(tokens=(1, 2), positions=(1,), labels=(1,))])
    assert made.quality() == {}


def test_what_is_trained_is_what_the_source_reads(tmp_path: Path):
    """The learner's value behind a position is the logit whose sigmoid the process source pays for that step."""
    from rlprm.engine.prm_head import load_prm

    path = tiny_prm.folder(tmp_path, "one")
    form = Separated(tiny_prm.tokenizer(), prompt="{question}", separator="\n", bos=False, head="classifier")
    steps = ("a\n", "!b\n", "c")
    [example] = written([Labelled(question="?", steps=steps, labels=(1, 0, 1))], form)
    shard, labels = laid_out([example])
    [micro] = micros(
        shard, torch.arange(1), token_fields={"label": labels}, sequence_fields={}, token_budget=99, layout="padded"
    )
    values = response_values(load_value(path, "float32", attention="sdpa", gradient_checkpointing=False), micro)
    trained = values[micro.token_fields["label"] >= 0]
    prm = load_prm(
        path,
        "float32",
        attention="sdpa",
        head="classifier",
        candidates=None,
        token_budget=99,
        layout="padded",
        device="cpu",
    )
    [read] = prm.probabilities([example.tokens], [example.positions])
    assert trained.sigmoid().tolist() == pytest.approx(read.tolist(), abs=1e-6)
    assert read.tolist() == pytest.approx([0.5, tiny_prm.chance(1, 6), tiny_prm.chance(1, 8)], abs=1e-5)


def test_gradient_flows_from_labelled_steps_alone():
    shard, labels = laid_out(EXAMPLES)
    [micro] = micros(
        shard, torch.arange(2), token_fields={"label": labels}, sequence_fields={}, token_budget=99, layout="padded"
    )
    values = torch.zeros(micro.tokens.shape, requires_grad=True)
    loss, _ = partial(label_cross_entropy, 3.0)(micro, Outputs(values=values))
    loss.backward()
    assert values.grad is not None
    label = torch.where(micro.response_mask, micro.token_fields["label"], -1)  # padding is 0 in every field
    assert torch.all(values.grad[label < 0] == 0)
    assert values.grad[label == 1].tolist() == pytest.approx([-0.5 / 3] * 2)
    assert values.grad[label == 0].tolist() == pytest.approx([0.5 / 3])
