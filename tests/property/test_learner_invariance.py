"""Loss and gradient do not know how a batch was cut: micro-batches, order, padding, packing."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlprm.core.packing import build_micro
from rlprm.engine import distributed
from rlprm.engine.learner import Learner
from rlprm.engine.model import load_causal
from rlprm.records import MicroBatch
from tests.integration import learner_program as program
from tests.integration import tiny_models

ROWS = len(program.LENGTHS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    distributed.join(0, 1, "127.0.0.1", port)
    yield tiny_models.folder(tmp_path_factory.mktemp("invariance"), 0, True)
    distributed.leave()


def one_update(folder: str, parts: list[MicroBatch]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of one update on ``parts``."""
    model = load_causal(folder, "float32", attention="sdpa", gradient_checkpointing=False)
    subject = Learner(model, program.PROBE)
    before = program.weights(subject)
    denominator = int(program.corpus().response.sum())
    loss = subject.update(parts, program.objective(denominator), temperature=0.7, entropy=True)["loss"].total
    after = program.weights(subject)
    subject.close()
    return loss, {name: (before[name] - after[name]).double() / program.GAIN for name in before}


@pytest.fixture(scope="module")
def whole(folder: str) -> tuple[float, dict[str, Tensor]]:
    return one_update(folder, program.micros(program.corpus(), list(range(ROWS)), budget=10**6, layout="padded"))


def more_padding(micro: MicroBatch, columns: int) -> MicroBatch:
    """The same padded micro-batch with ``columns`` more of padding on the right."""

    def pad(tensor: Tensor, value: int = 0) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, columns), value=value)

    return MicroBatch(
        tokens=pad(micro.tokens, 7),  # a pad id that is also a real token (the stop token)
        positions=pad(micro.positions),
        sequence=pad(micro.sequence, -1),
        response_mask=pad(micro.response_mask),
        packed=False,
        num_sequences=micro.num_sequences,
        token_fields={name: pad(field) for name, field in micro.token_fields.items()},
        sequence_fields=micro.sequence_fields,
    )


@st.composite
def cuts(draw: st.DrawFn) -> list[tuple[list[int], str, int]]:
    """A random order of the sequences, cut at random places; each piece with a layout and some extra padding."""
    order = draw(st.permutations(range(ROWS)))
    ends = [*sorted(draw(st.sets(st.integers(1, ROWS - 1)))), ROWS]
    starts = [0, *ends[:-1]]
    return [
        (list(order[a:b]), draw(st.sampled_from(["padded", "packed"])), draw(st.integers(0, 9)))
        for a, b in zip(starts, ends, strict=True)
    ]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=cuts())
def test_a_cut_leaves_no_trace(
    folder: str, whole: tuple[float, dict[str, Tensor]], pieces: list[tuple[list[int], str, int]]
) -> None:
    data = program.corpus()
    parts = []
    for rows, layout, columns in pieces:
        fields = {"advantages": data.advantages}
        micro = build_micro(rows, data.lengths, data.tokens, data.response, fields, {}, layout)  # type: ignore[arg-type]
        parts.append(micro if micro.packed else more_padding(micro, columns))
    loss, gradient = one_update(folder, parts)
    assert loss == pytest.approx(whole[0], rel=1e-6)
    difference = sum(float((gradient[name] - whole[1][name]).square().sum()) for name in gradient)
    assert (difference / sum(float(g.square().sum()) for g in whole[1].values())) ** 0.5 <= 1e-5
