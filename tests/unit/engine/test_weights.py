"""Manifest, buckets, digest and the process group."""

from __future__ import annotations

import hashlib
import os
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlprm.engine.weights import (
    Digest,
    GroupBroken,
    Manifest,
    _blocking_nccl,
    bucket_sizes,
    buckets,
    digest_of,
    free_port,
    make_group,
    named_weights,
    receive,
    recorded,
    send,
    unpack,
)
from rlprm.errors import StaleWeights

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8]


def some() -> list[tuple[str, Tensor]]:
    return [
        ("a", torch.arange(6, dtype=torch.float32).reshape(2, 3)),
        ("scalar", torch.tensor(7.0)),
        ("half", torch.linspace(-3, 3, 5).to(torch.bfloat16)),
        ("empty", torch.empty(0, 4)),
        ("turned", torch.arange(8, dtype=torch.float32).reshape(2, 4).t()),
        ("last", torch.tensor([1, 2, 3], dtype=torch.int64)),
    ]


@st.composite
def named_tensors(draw: st.DrawFn) -> list[tuple[str, Tensor]]:
    shapes = draw(st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=8))
    return [
        (f"w{index}", torch.randn(shape).mul(9).to(draw(st.sampled_from(DTYPES)))) for index, shape in enumerate(shapes)
    ]


@given(named_tensors(), st.integers(1, 400))
def test_unpacking_what_was_packed_gives_the_same_bits(named: list[tuple[str, Tensor]], bucket_bytes: int) -> None:
    manifest = Manifest.of(named)
    packed = list(buckets(named, bucket_bytes))
    assert [len(bucket) for bucket in packed] == bucket_sizes(manifest, bucket_bytes)
    back = list(unpack(manifest, [bucket.numpy() for bucket in packed]))
    assert [name for name, _ in back] == [name for name, _ in named]
    for (_, one), (_, two) in zip(named, back, strict=True):
        assert one.dtype == two.dtype
        assert one.shape == two.shape
        assert one.reshape(-1).view(torch.uint8).equal(two.reshape(-1).view(torch.uint8))
    assert digest_of(back) == digest_of(named)


def test_layout_of_buckets() -> None:
    # bytes 24, 4, 10, 0, 32, 24; each begins at a multiple of 16:
    # a 0..24, scalar 32..36 | half 48..58 would pass 48, so a new bucket: half 0..10, turned 16..48 | last 0..24
    assert Manifest.of(some()).sizes == (24, 4, 10, 0, 32, 24)
    assert Manifest.of(some()).nbytes == 94
    assert [len(bucket) for bucket in buckets(some(), 48)] == [36, 48, 24]


def test_unpack_takes_no_copy() -> None:
    (bucket,) = buckets(some(), 1000)
    weights = dict(unpack(Manifest.of(some()), [bucket]))
    assert weights["a"].data_ptr() == bucket.data_ptr()
    bucket.zero_()
    assert weights["turned"].abs().sum() == 0


def test_a_tensor_that_lives_only_for_its_turn_is_packed_in_time() -> None:
    def gathered() -> list[tuple[str, Tensor]]:
        for name, tensor in some():
            copy = tensor.clone()
            yield name, copy
            copy.zero_()  # what ZeRO-3 does when the gather ends

    packed = list(buckets(gathered(), 40))
    assert digest_of(unpack(Manifest.of(some()), packed)) == digest_of(some())


@pytest.mark.parametrize("missing", [0, 1, -1])
def test_a_missing_bucket_is_noticed(missing: int) -> None:
    packed = list(buckets(some(), 48))
    del packed[missing]
    with pytest.raises(StaleWeights, match="do not fit their manifest"):
        list(unpack(Manifest.of(some()), packed))


def test_bytes_left_over_are_noticed() -> None:
    packed = list(buckets(some(), 48))
    with pytest.raises(StaleWeights, match="left over"):
        list(unpack(Manifest.of(some()), [*packed, packed[0]]))
    with pytest.raises(StaleWeights, match="left over"):
        list(unpack(Manifest.of(some()[:-1]), packed))
    with pytest.raises(StaleWeights, match="left over in the bucket before"):
        list(unpack(Manifest.of(some()[1:]), packed))


def test_digest_is_sha256_of_sorted_lines() -> None:
    # torch stores 1.0 as 00 00 80 3f (little endian) and bf16 2.0 as 00 40
    one = hashlib.sha256(bytes.fromhex("0000803f")).hexdigest()
    two = hashlib.sha256(bytes.fromhex("0040")).hexdigest()
    expected = hashlib.sha256(f"a float32 (1,) {one}\nb bfloat16 () {two}\n".encode()).hexdigest()
    assert digest_of([("b", torch.tensor(2.0, dtype=torch.bfloat16)), ("a", torch.ones(1))]) == expected


@pytest.mark.parametrize(
    "changed",
    [
        [("b", torch.ones(2, 3))],
        [("a", torch.ones(3, 2))],
        [("a", torch.ones(2, 3, dtype=torch.float64))],
        [("a", torch.ones(2, 3).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(1.0000001)))],
        [("a", torch.ones(2, 3)), ("c", torch.ones(1))],
    ],
)
def test_digest_sees_name_shape_dtype_and_the_last_bit(changed: list[tuple[str, Tensor]]) -> None:
    assert digest_of(changed) != digest_of([("a", torch.ones(2, 3))])


def test_recorded_passes_everything_on() -> None:
    seen = Digest()
    assert [name for name, _ in recorded(some(), seen)] == [name for name, _ in some()]
    assert seen.hexdigest() == digest_of(some())
    assert len(list(recorded(some(), None))) == len(some())


def test_manifest_requires_exactly_the_expected_names_once() -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in some()}
    Manifest.of(some()).require(expected)
    Manifest.of(some()[::-1]).require(expected)
    with pytest.raises(StaleWeights, match=r"1 missing \(half\), 0 unexpected"):
        Manifest.of([pair for pair in some() if pair[0] != "half"]).require(expected)
    with pytest.raises(StaleWeights, match=r"1 unexpected \(more\)"):
        Manifest.of([*some(), ("more", torch.ones(1))]).require(expected)
    with pytest.raises(StaleWeights, match=r"1 twice \(a\)"):
        Manifest.of([*some(), some()[0]]).require(expected)
    with pytest.raises(StaleWeights, match=r"1 of another shape \(a: \(3, 2\) instead of \(2, 3\)\)"):
        Manifest.of([("a", torch.ones(3, 2)), *some()[1:]]).require(expected)
    with pytest.raises(StaleWeights, match=r"5 missing \(scalar, half, empty, turned, \.\.\.\)"):
        Manifest.of(some()[:1]).require(expected)


def test_manifest_of_meta_tensors_and_back_from_text() -> None:
    meta = [(name, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")) for name, tensor in some()]
    assert Manifest.of(meta) == Manifest.of(some()) == Manifest.loads(Manifest.of(some()).dumps())


def test_tied_weights_travel_once_and_persistent_buffers_travel() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(4, 2)
            self.head = torch.nn.Linear(2, 4, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("bias", torch.zeros(1))
            self.register_buffer("scratch", torch.zeros(1), persistent=False)

    assert sorted(name for name, _ in named_weights(Tied())) == ["bias", "embed.weight"]


@pytest.mark.parametrize("digest", [True, False])
def test_a_group_carries_every_bit_to_each_receiver(digest: bool) -> None:
    port, world = free_port(), 3
    found: dict[int, list[tuple[str, Tensor]]] = {}

    def receiver(rank: int) -> None:
        group = make_group("127.0.0.1", port, rank, world, "gloo", 20.0)
        manifest = Manifest.of(some())
        found[rank] = list(unpack(manifest, receive(group, manifest, 48)))

    threads = [threading.Thread(target=receiver, args=(rank,)) for rank in (1, 2)]
    for thread in threads:
        thread.start()
    group = make_group("127.0.0.1", port, 0, world, "gloo", 20.0)
    sent = send(group, some(), 48, digest)
    for thread in threads:
        thread.join(timeout=30)
    assert sent == (digest_of(some()) if digest else "")
    assert [digest_of(found[rank]) for rank in (1, 2)] == [digest_of(some())] * 2


def test_a_group_whose_receiver_never_comes_ends_with_an_error() -> None:
    with pytest.raises(GroupBroken, match="rank 0 met fewer than 2 members of the weights' group"):
        make_group("127.0.0.1", free_port(), 0, 2, "gloo", 1.0)


def test_a_member_that_leaves_ends_the_wait_of_the_others_and_nobody_sends_through_a_group_that_was_left() -> None:
    port, raised, begin = free_port(), [], time.monotonic()

    def receiver() -> None:
        group = make_group("127.0.0.1", port, 1, 2, "gloo", 30.0)
        try:
            list(receive(group, Manifest.of(some()), 48))
        except GroupBroken as error:
            raised.append(str(error))

    thread = threading.Thread(target=receiver)
    thread.start()
    group = make_group("127.0.0.1", port, 0, 2, "gloo", 30.0)
    group.leave()
    group.leave()
    thread.join(timeout=20)
    assert len(raised) == 1
    assert raised[0].startswith("the weights' group broke: ")
    assert time.monotonic() - begin < 10
    with pytest.raises(GroupBroken, match="must be made anew"):
        send(group, some(), 48, False)


@pytest.mark.parametrize("before", [None, "0"])
def test_only_the_weights_group_of_nccl_is_told_to_raise(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "TORCH_NCCL_BLOCKING_WAIT"
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    with _blocking_nccl():
        assert os.environ[name] == "1"
    assert os.environ.get(name) == before
