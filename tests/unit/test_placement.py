"""Who sits where, and what is said when it does not fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlprm.actors.nodes import Node
from rlprm.actors.seating import numbered
from rlprm.errors import ConfigError
from rlprm.placement import Seats, check_placement, seats


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The part of a placement that decides seats."""

    nodes: int = 1
    policy_ranks: int = 4
    policy_nodes: list[int] | None = None
    gpus_per_rank: float = 1.0
    prm_ranks: int = 2
    prm_nodes: list[int] | None = None
    engines: int = 2
    engine_nodes: list[int] | None = None
    tensor_parallel: int = 1
    gpus_per_engine: float = 1.0


def on_cpu(**changed: Any) -> Asked:
    return Asked(**{"gpus_per_rank": 0.0, "gpus_per_engine": 0.0, **changed})


def cluster(*gpus: int | float, cpus: float = 8.0) -> list[Node]:
    return [
        Node(index=index, id=f"id{index}", name=f"host{index}", address=f"10.0.0.{index}", cpus=cpus, gpus=float(each))
        for index, each in enumerate(gpus)
    ]


def used(found: Seats, asked: Asked, index: int) -> float:
    """GPUs that the seats take of one node."""
    engine = asked.gpus_per_engine * asked.tensor_parallel
    ranks = found.policy.count(index) + found.prm.count(index)
    return ranks * asked.gpus_per_rank + (found.engines.count(index) + found.own_engines.count(index)) * engine


def test_one_node_holds_everything() -> None:
    assert seats(Asked(), cluster(8), 0) == Seats(policy=(0,) * 4, prm=(0, 0), engines=(0, 0), own_engines=())


def test_gpus_are_filled_in_order_policy_prm_engines() -> None:
    found = seats(Asked(), cluster(5, 4), 1)
    assert found == Seats(policy=(0, 0, 0, 0), prm=(0, 1), engines=(1, 1), own_engines=(1,))


def test_a_list_is_dealt_out_in_turn_and_seated_first() -> None:
    found = seats(Asked(policy_nodes=[1, 0], engine_nodes=[1]), cluster(4, 4), 0)
    assert found == Seats(policy=(1, 0, 1, 0), prm=(0, 0), engines=(1, 1), own_engines=())


def test_on_cpu_the_roles_are_dealt_over_the_nodes_without_a_gap() -> None:
    asked = on_cpu(policy_ranks=3, prm_ranks=2, engines=1)
    assert seats(asked, cluster(0, 0), 1) == Seats(policy=(0, 1, 0), prm=(1, 0), engines=(1,), own_engines=(0,))


def test_a_head_without_cpus_gets_no_work() -> None:
    head, *others = cluster(0, 0, 0)
    nodes = [Node(index=0, id=head.id, name=head.name, address=head.address, cpus=0.0, gpus=0.0), *others]
    assert set(seats(on_cpu(), nodes, 0).policy) == {1, 2}
    assert set(seats(on_cpu(), cluster(0, cpus=0.0), 0).policy) == {0}  # unless there is nobody else


def test_gpus_of_one_engine_are_on_one_node() -> None:
    found = seats(Asked(policy_ranks=3, prm_ranks=1, engines=1, tensor_parallel=4), cluster(7, 4), 0)
    assert found.engines == (1,)  # node 0 has three left


def test_where_filling_in_order_leaves_a_hole_the_largest_go_first() -> None:
    found = seats(Asked(policy_ranks=2, prm_ranks=0, tensor_parallel=3), cluster(4, 4), 0)
    assert sorted(found.engines) == sorted(found.policy) == [0, 1]


def test_shares_of_a_gpu_do_not_add_up_over_gpus() -> None:
    shared = Asked(policy_ranks=1, prm_ranks=1, engines=1, gpus_per_rank=0.25, gpus_per_engine=0.5)
    assert seats(shared, cluster(1), 0).engines == (0,)
    two_thirds = Asked(policy_ranks=3, prm_ranks=0, engines=1, gpus_per_rank=0.6, gpus_per_engine=0.2)
    with pytest.raises(
        ConfigError, match=r"policy rank 2 of 3 takes 0\.6 GPUs .*node 0 \(host0\) has 2 GPUs, 0\.8 free"
    ):
        seats(two_thirds, cluster(2), 0)  # 2.0 in all, but each of the two GPUs has 0.4 left


def test_a_node_that_others_use_has_less() -> None:
    assert seats(Asked(), cluster(2.5, 8), 0).policy == (0, 0, 1, 1)


@pytest.mark.parametrize(
    ("asked", "nodes", "said"),
    [
        (
            Asked(policy_ranks=8),
            cluster(4, 4),
            r"PRM rank 0 of 2 takes 1 GPU and finds no room: node 0 \(host0\) has 4 GPUs, 0 free; node 1 .* asks for 12 GPUs "
            r"in all .*placement\.policy_ranks=4, or 1 more node of 4 GPUs",
        ),
        (
            Asked(policy_ranks=2, prm_ranks=0, engines=5),
            cluster(4),
            r"rollout engine 2 of 5 .*Nearest change that finds room .* memory fits\): placement\.engines=2, or 1 more node",
        ),
        (
            Asked(policy_ranks=1, prm_ranks=0, engines=1, tensor_parallel=16),
            cluster(8, 8),
            r"takes 16 GPUs of one node .*the largest node, 0 \(host0\), has 8\. .*placement\.tensor_parallel=8$",
        ),
        (
            Asked(policy_nodes=[0]),
            cluster(2, 8),
            r"policy rank 2 of 4 takes 1 GPU, which placement\.policy_nodes puts there, and finds no room: node 0 \(host0\) "
            r"has 2 GPUs, 0 free\. .*placement\.policy_nodes=null$",
        ),
        (
            Asked(engine_nodes=[2]),
            cluster(8, 8),
            r"placement\.engine_nodes names node 2 and the nodes are 0: host0, 1: host1\. .*placement\.engine_nodes=null",
        ),
        (
            Asked(policy_ranks=64, engines=16, tensor_parallel=4),
            cluster(8, 8),
            r"asks for 130 GPUs .*placement\.policy_ranks=\d+ .*placement\.engines=\d+ .*or 15 more nodes of 8 GPUs",
        ),
        (Asked(), cluster(0, 0), r"needs GPUs and the nodes have none \(0: host0, 1: host1\); use placement=cpu"),
        (
            Asked(policy_ranks=1, prm_ranks=1, engines=1, gpus_per_rank=0.5, gpus_per_engine=0.5),
            cluster(1),
            r"Nearest change that finds room .* memory fits\): placement\.gpus_per_rank=0\.25",
        ),
        (on_cpu(policy_nodes=[3]), cluster(0, 0), r"policy_nodes names node 3 .*placement\.policy_nodes=null"),
        (Asked(), [], r"there is no node"),
    ],
)
def test_what_does_not_fit_names_the_node_and_the_nearest_change(asked: Asked, nodes: list[Node], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        seats(asked, nodes, 0)


def test_without_prm_ranks_no_gpu_is_kept_for_them() -> None:
    asked = Asked(policy_ranks=4, prm_ranks=3, engines=4, prm_nodes=[0, 0, 0])
    with pytest.raises(ConfigError, match=r"rollout engine 1 of 4 .* finds no room"):
        seats(asked, cluster(8), 0)
    found = seats(asked, cluster(8), 0, prm=False)
    assert (found.policy, found.prm, found.engines) == ((0,) * 4, (), (0,) * 4)
    with pytest.raises(
        ConfigError, match=r"asks for 10 GPUs in all \(4 x 1 for policy ranks, 6 x 1 for rollout engines\)"
    ):
        seats(Asked(policy_ranks=4, engines=6), cluster(8), 0, prm=False)


def test_advice_can_be_left_to_those_who_know_the_memory() -> None:
    with pytest.raises(ConfigError, match=r"for rollout engines\)$"):
        seats(Asked(policy_ranks=8), cluster(8), 0, advice=False)


def test_the_nearest_change_fits() -> None:
    seats(Asked(policy_ranks=4), cluster(4, 4), 0)
    seats(Asked(policy_ranks=8), cluster(4, 4, 4), 0)
    seats(Asked(policy_ranks=64, engines=16, tensor_parallel=4), cluster(*[8] * 17), 0)


@given(
    st.lists(st.integers(0, 8), min_size=1, max_size=4),
    st.integers(1, 8),
    st.integers(0, 4),
    st.integers(1, 4),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([0.25, 0.5, 1.0, 2.0]),
)
def test_no_node_gives_more_than_it_has(
    gpus: list[int], policy: int, prm: int, engines: int, parallel: int, share: float
) -> None:
    asked = Asked(policy_ranks=policy, prm_ranks=prm, engines=engines, tensor_parallel=parallel, gpus_per_rank=share)
    try:
        found = seats(asked, cluster(*gpus), 1)
    except ConfigError:
        return
    assert [len(found.policy), len(found.prm), len(found.engines), len(found.own_engines)] == [policy, prm, engines, 1]
    assert all(used(found, asked, index) <= have for index, have in enumerate(gpus))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            Asked(nodes=2, prm_nodes=[0, 2]),
            r"prm_nodes names node 2 and placement\.nodes is 2.*nodes=3.*prm_nodes=\[0,1\]",
        ),
        (
            Asked(nodes=3, engine_nodes=[0, 1, 2]),
            r"engine_nodes names 3 nodes and placement\.engines is 2.*=\[0,1\].*engines=3",
        ),
        (Asked(gpus_per_rank=1.5), r"placement\.gpus_per_rank is 1\.5; .*use 1 or 2"),
        (Asked(tensor_parallel=2, gpus_per_engine=0.5), r"each part of an engine has a GPU of its own"),
    ],
)
def test_what_is_wrong_on_any_cluster(asked: Asked, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_placement(asked)


def test_a_configuration_with_such_a_list_is_refused() -> None:
    from rlprm.cli.compose import composed
    from rlprm.config import TrainConfig, validated

    made = composed("train", ["model.path=x", "placement.nodes=2", "placement.engine_nodes=[4]"])
    with pytest.raises(ConfigError, match=r"placement\.engine_nodes names node 4 and placement\.nodes is 2"):
        validated(TrainConfig, made.values)


def alive(*names: str) -> list[Node]:
    """Nodes as Ray lists them; the letter is the name, what follows it tells lives of one node apart."""
    return [
        Node(index=index, id=name, name=name[0], address="10.0.0.1", cpus=1.0, gpus=0.0)
        for index, name in enumerate(names)
    ]


def test_numbers_stay_while_nodes_come_and_go() -> None:
    known = numbered(alive("a", "b", "c"), {})
    assert {number: node.id for number, node in known.items()} == {0: "a", 1: "b", 2: "c"}
    without = numbered(alive("a", "c"), known)
    assert {number: node.id for number, node in without.items()} == {0: "a", 2: "c"}
    returned = numbered(alive("a", "b2", "c", "d"), known | without)
    assert {number: node.id for number, node in returned.items()} == {0: "a", 1: "b2", 2: "c", 3: "d"}


def test_nodes_of_one_name_have_numbers_of_their_own() -> None:
    known = numbered(alive("a", "a2"), {})
    assert [node.id for node in known.values()] == ["a", "a2"]
    assert {number: node.id for number, node in numbered(alive("a2", "a3"), known).items()} == {0: "a3", 1: "a2"}
