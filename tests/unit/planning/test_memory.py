"""Parts of a learner's memory against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rlprm.planning.activations import Micro
from rlprm.planning.engines import engine
from rlprm.planning.memory import GIB, Learns, frozen, learner, peak
from rlprm.planning.shapes import shapes

SEVEN = shapes()["qwen2.5-math-7b"]  # P = 7,615,616,512
HOW = Learns(
    micro=Micro.largest(8192, 1024, 3072, "padded"), ranks=4, zero=2, offload=False, dtype="bfloat16", attention="sdpa",
    checkpointing=True, on_gpu=True, accumulates=True, entropy=True,
)  # fmt: skip


def test_seven_billion_in_bf16_with_zero_2_on_four_ranks() -> None:
    """By hand: weights 2 P = 15,231,233,024; a rank's quarter of P is 1,903,904,128 parameters:
    master and two moments 12 bytes each = 22,846,849,536, float32 gradients 4 bytes = 7,615,616,512;
    two buckets of 5e8 bf16 numbers = 2e9.

    Activations with checkpointing: 8192 tokens x 28 layers x 3584 x 2 bytes = 1,644,167,168 for the layers' inputs, and
    one layer: per token 2 x (6 x 3584 + 4) + 2 x 2 x 3584 (norms) + 2 x (2 + 2) x 3584 (queries, repeated keys and
    values, output) + 8 x 18944 (MLP) + 4 x 28 = 237,688 bytes, times 8192 = 1,947,140,096, and the mask
    2 x 4096 x 4096 x 2 = 67,108,864.

    Output layer: 2**26 // 152064 = 441 rows of logits, 441 x 152064 x 14 bytes, and 152064 x 3584 x 10 bytes for the
    gradient of its weight: 938,843,136 + 5,449,973,760 = 6,388,816,896.
    """
    held = learner(SEVEN, HOW)
    assert held.always == {"weights": 15_231_233_024, "optimizer": 22_846_849_536}
    backward = held.phases["backward"]
    assert backward["gradients"] == 7_615_616_512
    assert backward["buckets"] == 2_000_000_000
    assert backward["logits and their gradients"] == 6_388_816_896
    final = 8192 * (6 * 3584 + 4 + 8 + 2 * 2 * 128) + 6144 * (2 * 3584 + 24)  # last norm, and the rows that are scored
    assert backward["activations"] == 1_644_167_168 + 1_947_140_096 + 67_108_864 + final


@pytest.mark.parametrize(
    ("zero", "dtype", "weights", "optimizer", "gradients"),
    [  # multiples of P over 4 ranks; gradients: when all are there, in the backward pass
        (0, "float32", 4, 8, 4), (1, "float32", 4, 3, 4), (2, "float32", 4, 3, 1), (3, "float32", 1, 2, 1),
        (0, "bfloat16", 2, 12, 2), (1, "bfloat16", 2, 3, 4), (2, "bfloat16", 2, 3, 1), (3, "bfloat16", 0.5, 3, 1),
    ],
)  # fmt: skip
def test_stages(zero: int, dtype: str, weights: float, optimizer: float, gradients: float) -> None:
    held = learner(SEVEN, replace(HOW, zero=zero, dtype=dtype))
    number = SEVEN.parameters
    assert held.always["weights"] == weights * number
    assert held.always["optimizer"] == optimizer * number
    assert {**held.always, **held.phases["backward"]}["gradients"] == gradients * number


def test_offload_moves_the_optimizer_to_the_host_and_leaves_the_rest() -> None:
    held = learner(SEVEN, replace(HOW, offload=True))
    quarter = SEVEN.parameters // 4
    assert "optimizer" not in held.always
    assert held.host == {"optimizer": 12 * quarter, "gradients": 4 * quarter, "staging": 2 * quarter}
    assert held.always["weights"] == 2 * SEVEN.parameters


def test_buckets_take_their_whole_size_on_a_gpu_and_what_is_used_on_a_cpu() -> None:
    small = shapes()["qwen2.5-0.5b"]
    on_gpu = learner(small, HOW).phases["backward"]["buckets"]
    assert on_gpu == 2_000_000_000  # though the model has fewer numbers than one bucket
    on_cpu = learner(small, replace(HOW, on_gpu=False, dtype="float32")).phases
    assert "buckets" not in on_cpu["backward"]
    assert on_cpu["reduce"]["buckets"] == 2 * 4 * small.parameters  # filled, and a flat copy


def test_a_process_with_several_models_has_the_highest_of_their_phases_not_the_sum() -> None:
    one = learner(SEVEN, HOW)
    both = peak({"prm": one, "reference": frozen(SEVEN, HOW.micro, dtype="bfloat16")}, framework=0, slack=0.0)
    alone = peak({"prm": one}, framework=0, slack=0.0)
    assert both.phase == "prm: backward"
    assert both.total == alone.total + 2 * SEVEN.parameters


def test_what_is_left_of_an_engines_share_holds_keys_and_values() -> None:
    rollout = {"max_num_seqs": 256, "kv_cache_bytes": None, "gpu_memory_utilization": 0.85, "enforce_eager": True}
    found = engine(SEVEN, rollout, dtype="bfloat16", longest=4096, tensor_parallel=1, gpu_memory=80 * GIB, bucket=1)
    # 0.85 x 80 GiB - weights - one GiB - 8192 x 2 x (2 x 18944 + 4 x 3584) - 256 x 152064 x 12
    room = int(0.85 * 80 * GIB) - 15_231_233_024 - GIB - 8192 * 2 * 52224 - 256 * 152064 * 12
    assert found.cache == room
    assert found.sequences == room // (57344 * 4096)
    assert sum(found.parts.values()) == int(0.85 * 80 * GIB) + 2 * SEVEN.embedding


def test_an_engine_that_cannot_start_says_why() -> None:
    rollout = {"max_num_seqs": 8, "kv_cache_bytes": None, "gpu_memory_utilization": 0.2, "enforce_eager": True}
    found = engine(SEVEN, rollout, dtype="bfloat16", longest=4096, tensor_parallel=1, gpu_memory=80 * GIB, bucket=1)
    assert "one sequence of 4096 tokens" in str(found.problem)
    long = engine(SEVEN, {**rollout, "gpu_memory_utilization": 0.9}, dtype="bfloat16", longest=5000, tensor_parallel=1,
                  gpu_memory=80 * GIB, bucket=1)  # fmt: skip
    assert "has 4096 positions" in str(long.problem)
    split = engine(SEVEN, {**rollout, "gpu_memory_utilization": 0.9}, dtype="bfloat16", longest=4096,
                   tensor_parallel=3, gpu_memory=80 * GIB, bucket=1)  # fmt: skip
    assert "cannot be split over 3" in str(split.problem)
