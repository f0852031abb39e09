"""The flow network, the hidden states that it reads, and which token is judged by which."""

from __future__ import annotations

import pytest
import torch

from rlprm.core.packing import build_micro
from rlprm.engine.flow import FlowNetwork, LayerStates, pairs
from rlprm.errors import ConfigError
from tests.integration import tiny_models

LENGTHS = torch.tensor([5, 3])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.folder(tmp_path_factory.mktemp("model"), 0, True)


def micro(layout):
    tokens = torch.arange(8) + 10
    response = torch.tensor([False, False, True, True, True, False, True, True])
    return build_micro([0, 1], LENGTHS, tokens, response, {"place": torch.arange(8)}, {}, layout)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_pairs_stay_inside_the_response_and_its_sequence(layout):
    batch = micro(layout)
    place = batch.token_fields["place"].flatten()
    judged, by = pairs(batch, "previous")
    assert list(zip(place[judged].tolist(), place[by].tolist(), strict=True)) == [
        (2, 1),
        (3, 2),
        (4, 3),
        (6, 5),
        (7, 6),
    ]
    judged, by = pairs(batch, "next")
    assert list(zip(place[judged].tolist(), place[by].tolist(), strict=True)) == [(2, 3), (3, 4), (6, 7)]


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_states_are_those_of_plain_transformers(folder: str, layout: str):
    states = LayerStates(folder, "float32", "cpu", [0.0, 1.0], attention="sdpa")
    assert states.depths == (0.0, 0.5)  # of two layers: the first, and p = 1 is the last
    batch = micro(layout)
    found = states(batch)
    plain = tiny_models.model(0, True)
    alone = plain(input_ids=batch.tokens[batch.sequence == 0][None], output_hidden_states=True).hidden_states
    mine = (batch.sequence == 0).flatten()
    assert torch.allclose(found[0][mine], alone[1][0], atol=1e-5)  # [0] is the embedding
    # the last entry of transformers is after the final norm, the layer's own output before it
    assert torch.allclose(plain.model.norm(found[1][mine]), alone[2][0], atol=1e-5)
    assert not any(layer._forward_hooks for layer in states._layers)


def test_a_layer_counts_once_and_depths_outside_the_model_are_refused(folder: str):
    assert LayerStates(folder, "float32", "cpu", [0.75, 0.5, 0.0], attention="sdpa").depths == (0.0, 0.5)
    with pytest.raises(ConfigError, match="depths from 0 to 1"):
        LayerStates(folder, "float32", "cpu", [1.5], attention="sdpa")


def test_a_new_network_predicts_no_velocity():
    network = FlowNetwork(4, width=8, depth=2)
    target, noise = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    found = network.errors(target, torch.ones(1, 4), noise, torch.tensor([0.8]), 0.5)
    assert found.tolist() == pytest.approx([(1 + 4 + 4 + 16) / 4])  # mean of (z - e)^2


def test_it_learns_states_that_the_condition_tells():
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    network = FlowNetwork(4, width=32, depth=2)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    other = torch.randn(256, 4, generator=generator)
    condition = torch.randn(256, 4, generator=generator)
    target = condition * 2.0

    def error(states):
        noise = torch.randn(256, 4, generator=torch.Generator().manual_seed(1))
        return network.errors(states, condition, noise, torch.full((256,), 0.8), 0.5).mean()

    before = float(error(target).detach())
    for _ in range(200):
        noise = torch.randn(256, 4, generator=generator)
        loss = network.errors(target, condition, noise, torch.full((256,), 0.8), 0.5).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    learnt, unlike = float(error(target).detach()), float(error(other).detach())
    assert learnt < 0.3 * before
    assert unlike > 2 * learnt
