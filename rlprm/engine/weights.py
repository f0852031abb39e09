"""Weights from a learner to an engine: what is sent (manifest), how (buckets), by which way, and proof that it came.

A :class:`Manifest` names every tensor before the first byte travels, so an engine refuses a wrong set before it touches
anything. The bytes travel in flat uint8 buckets (so bf16 survives NumPy), either as arrays the caller hands over
(:func:`buckets` on one side, :func:`unpack` on the other) or through a process group (:func:`send`, :func:`receive`).
Both sides compute the same :class:`Digest` however the bytes were cut.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import socket
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rlprm.engine.distributed import meet
from rlprm.errors import StaleWeights, WorkerLost

ALIGNMENT = 16  # bytes; a tensor may be viewed as its dtype only at a multiple of the item size
SHOWN = 4  # names an error message lists

Backend = Literal["gloo", "nccl"]


class GroupBroken(WorkerLost):
    """Another member of the weights' group is gone or cut off; this one has left, and the group must be made anew."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """Names, shapes and dtypes of a whole set of weights, in the order in which they travel.

    >>> manifest = Manifest.of([("w", torch.zeros(2, 3)), ("b", torch.zeros(3, dtype=torch.bfloat16))])
    >>> manifest.nbytes, Manifest.loads(manifest.dumps()) == manifest
    (30, True)
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]  # "float32", "bfloat16"...

    @classmethod
    def of(cls, named_tensors: Iterable[tuple[str, Tensor]]) -> Manifest:
        """The manifest of ``named_tensors``; for tensors that are not gathered, give meta tensors of the full shape."""
        rows = [(name, tuple(tensor.shape), _dtype_name(tensor.dtype)) for name, tensor in named_tensors]
        return cls(tuple(row[0] for row in rows), tuple(row[1] for row in rows), tuple(row[2] for row in rows))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each tensor."""
        return tuple(
            math.prod(shape) * getattr(torch, dtype).itemsize
            for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without the padding of the buckets."""
        return sum(self.sizes)

    def dumps(self) -> str:
        """The manifest as JSON text (worker calls carry plain types only)."""
        return json.dumps([self.names, self.shapes, self.dtypes])

    @classmethod
    def loads(cls, text: str) -> Manifest:
        """The inverse of :meth:`dumps`."""
        names, shapes, dtypes = json.loads(text)
        return cls(tuple(names), tuple(tuple(shape) for shape in shapes), tuple(dtypes))

    def require(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Accept exactly the ``expected`` names and shapes, each once.

        vLLM accepts a partial set with a log line only, and samples from a half-updated model from then on.

        >>> Manifest(("a",), ((2,),), ("float32",)).require({"a": (2,), "b": (2,)})
        Traceback (most recent call last):
        rlprm.errors.StaleWeights: ... 1 missing (b), 0 unexpected, 0 twice, 0 of another shape; ...

        Raises:
            StaleWeights: names are missing, unexpected or doubled, or a shape differs.
        """
        given = dict(zip(self.names, self.shapes, strict=True))
        missing = [name for name in expected if name not in given]
        unexpected = [name for name in given if name not in expected]
        seen: set[str] = set()
        twice = [name for name in self.names if name in seen or seen.add(name)]
        reshaped = [
            f"{name}: {shape} instead of {tuple(expected[name])}"
            for name, shape in given.items()
            if name in expected and shape != tuple(expected[name])
        ]
        if missing or unexpected or twice or reshaped:
            raise StaleWeights(
                f"found {len(self.names)} weights where the engine expects {len(expected)}: "
                f"{_some(missing, 'missing')}, {_some(unexpected, 'unexpected')}, {_some(twice, 'twice')}, "
                f"{_some(reshaped, 'of another shape')}; nothing was changed; "
                "publish the whole set from a model of the same config"
            )


class Digest:
    """sha256 over the tensors' (name, dtype, shape, sha256 of bytes), sorted by name: cut and order do not matter.

    >>> one, two = Digest(), Digest()
    >>> for name in ("a", "b"): one.update(name, torch.ones(2))
    >>> for name in ("b", "a"): two.update(name, torch.ones(2))
    >>> one.hexdigest() == two.hexdigest(), len(one.hexdigest())
    (True, 64)
    """

    def __init__(self) -> None:
        self._lines: dict[str, str] = {}

    def update(self, name: str, tensor: Tensor) -> None:
        """Take in one tensor (copied to the host if it is elsewhere)."""
        content = hashlib.sha256(as_bytes(tensor).cpu().numpy()).hexdigest()
        self._lines[name] = f"{name} {_dtype_name(tensor.dtype)} {tuple(tensor.shape)} {content}\n"

    def hexdigest(self) -> str:
        """The digest of everything taken in so far."""
        return hashlib.sha256("".join(self._lines[name] for name in sorted(self._lines)).encode()).hexdigest()


def digest_of(named_tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The :class:`Digest` of ``named_tensors``."""
    digest = Digest()
    for name, tensor in named_tensors:
        digest.update(name, tensor)
    return digest.hexdigest()


def named_weights(module: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers under their checkpoint names; tied ones once, under their first name."""
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def as_bytes(tensor: Tensor) -> Tensor:
    """The tensor's bytes as a flat uint8 view (a copy only if it is not contiguous)."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def buckets(named_tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int) -> Iterator[Tensor]:
    """Pack tensors, in their order, into flat uint8 buckets of at most ``bucket_bytes`` each.

    Each tensor starts at a multiple of 16 bytes and lies in one bucket; one larger than ``bucket_bytes`` gets a bucket
    of its own. A tensor is copied as it arrives, so it may be gathered (ZeRO-3) just for the moment of its turn. A
    bucket is never written again once it has been yielded.

    >>> [len(bucket) for bucket in buckets([("a", torch.zeros(3)), ("b", torch.zeros(2)), ("c", torch.zeros(9))], 32)]
    [24, 36]
    """
    buffer, used = torch.empty(0, dtype=torch.uint8), 0
    for _, tensor in named_tensors:
        data = as_bytes(tensor)
        if len(data) == 0:
            continue
        start = _aligned(used)
        if used and start + len(data) > bucket_bytes:
            yield buffer[:used]
            used = start = 0
        if used == 0:
            buffer = torch.empty(max(bucket_bytes, len(data)), dtype=torch.uint8, device=data.device)
        buffer[used:start] = 0  # the padding travels too, and must not carry old memory
        buffer[start : start + len(data)] = data
        used = start + len(data)
    if used:
        yield buffer[:used]


def bucket_sizes(manifest: Manifest, bucket_bytes: int) -> list[int]:
    """The sizes of the buckets that :func:`buckets` makes of these tensors, in bytes."""
    sizes: list[int] = []
    used = 0
    for size in filter(None, manifest.sizes):
        start = _aligned(used)
        if used and start + size > bucket_bytes:
            sizes.append(used)
            start = 0
        used = start + size
    return [*sizes, used] if used else sizes


def unpack(manifest: Manifest, packed: Iterable[Tensor | np.ndarray]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of ``manifest`` as views into the buckets (no copy): the inverse of :func:`buckets`.

    The views keep their bucket alive; an engine may hold some until a layer is complete: do not reuse a bucket.

    >>> named = [("a", torch.tensor([1.0, 2.0])), ("b", torch.tensor([3], dtype=torch.bfloat16))]
    >>> [(name, tensor.tolist()) for name, tensor in unpack(Manifest.of(named), buckets(named, 8))]
    [('a', [1.0, 2.0]), ('b', [3.0])]

    Raises:
        StaleWeights: the buckets do not hold exactly the manifest's bytes.
    """
    source = iter(packed)
    current, used = torch.empty(0, dtype=torch.uint8), 0
    for name, shape, dtype, size in zip(manifest.names, manifest.shapes, manifest.dtypes, manifest.sizes, strict=True):
        if size == 0:
            yield name, torch.empty(shape, dtype=getattr(torch, dtype))
            continue
        start = _aligned(used)
        if start + size > len(current):
            if used != len(current):
                raise StaleWeights(_torn(name, f"{len(current) - used} bytes are left over in the bucket before it"))
            following = next(source, None)
            if following is None:
                raise StaleWeights(_torn(name, "there is no further bucket"))
            current, start = _flat(following), 0
            if size > len(current):
                raise StaleWeights(_torn(name, f"{size} bytes were announced and the bucket holds {len(current)}"))
        used = start + size
        yield name, current[start:used].view(getattr(torch, dtype)).view(shape)
    if used != len(current) or next(source, None) is not None:
        raise StaleWeights(_torn("the last weight", "bytes are left over"))


@dataclass(slots=True)
class Group:
    """A process group beside the default one; rank 0 sends, the others receive."""

    process_group: Any  # ProcessGroupGloo or ProcessGroupNCCL, which share no public base class; None once it was left
    store: dist.Store | None  # kept: the group's rendezvous lives as long as the group
    backend: str

    def broadcast(self, data: Tensor) -> None:
        """``data`` of rank 0 into ``data`` of all ranks; returns when done.

        Raises:
            GroupBroken: a member is gone, or did not take part in time. The group is left, so that nobody waits for
                this process either.
        """
        if self.process_group is None:
            raise GroupBroken("the weights' group was left; it must be made anew")
        options = dist.BroadcastOptions()
        options.rootRank = 0
        try:
            self.process_group.broadcast([data], options).wait()
            if self.backend == "nccl":
                # NCCL's wait() orders the stream only; the buffer may be freed or hashed on the host next
                torch.cuda.current_stream().synchronize()
        except RuntimeError as error:  # torch.distributed.DistError is one
            self.leave()
            raise GroupBroken(f"the weights' group broke: {' '.join(str(error).split())}") from None

    def leave(self) -> None:
        """Close this process's connections at once; whatever waits for it fails then. Calling it twice is fine."""
        if self.process_group is not None:
            self.process_group.abort()  # also what NCCL still has on its streams; a mere destructor would wait for it
        self.process_group = self.store = None

    def device(self) -> torch.device:
        """Where the broadcast buffers of this process must lie."""
        return torch.device("cuda", torch.cuda.current_device()) if self.backend == "nccl" else torch.device("cpu")


def make_group(host: str, port: int, rank: int, world: int, backend: Backend, timeout_s: float) -> Group:
    """A group of ``world`` processes that meet at ``host:port``, where rank 0 listens; blocks until all have come.

    It lives next to the default process group and does not need one, so a learner that trains in its own group can
    reach engines that are not part of it. ``backend`` nccl for tensors on GPUs, gloo on CPUs.

    Raises:
        ConfigError: rank 0 cannot listen there.
        GroupBroken: not all came within ``timeout_s``.
    """
    timeout = timedelta(seconds=timeout_s)
    try:
        store = dist.PrefixStore("rlprm_weights", meet(host, port, rank, world, timeout_s))
        if backend == "gloo":
            return Group(dist.ProcessGroupGloo(store, rank, world, timeout), store, backend)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        with _blocking_nccl():
            return Group(dist.ProcessGroupNCCL(store, rank, world, options), store, backend)
    except RuntimeError as error:
        raise GroupBroken(
            f"rank {rank} met fewer than {world} members of the weights' group at {host}:{port}: "
            f"{' '.join(str(error).split())}"
        ) from None


@contextmanager
def _blocking_nccl() -> Iterator[None]:
    """A group that is made meanwhile raises when a member is missing too long; by itself NCCL's ends the process.

    Read when the group is made, so the learner's own group goes on as it was.
    """
    name = "TORCH_NCCL_BLOCKING_WAIT"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def send(group: Group, named_tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int, digest: bool) -> str:
    """Broadcast ``named_tensors`` from rank 0, bucket by bucket; returns their digest ("" without ``digest``).

    At most one bucket is held at a time. The receivers must have been given the manifest of the same tensors in the
    same order, and the same ``bucket_bytes``.
    """
    seen = Digest()
    for bucket in buckets(recorded(named_tensors, seen if digest else None), bucket_bytes):
        group.broadcast(bucket.to(group.device()))
    return seen.hexdigest() if digest else ""


def receive(group: Group, manifest: Manifest, bucket_bytes: int) -> Iterator[Tensor]:
    """The buckets that rank 0 sends, each in a buffer of its own (see :func:`unpack` for why)."""
    for size in bucket_sizes(manifest, bucket_bytes):
        bucket = torch.empty(size, dtype=torch.uint8, device=group.device())
        group.broadcast(bucket)
        yield bucket


def recorded(pairs: Iterable[tuple[str, Tensor]], digest: Digest | None) -> Iterator[tuple[str, Tensor]]:
    """``pairs`` as they pass, each taken into ``digest`` if there is one."""
    for name, tensor in pairs:
        if digest is not None:
            digest.update(name, tensor)
        yield name, tensor


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port of ``host`` that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _flat(bucket: Tensor | np.ndarray) -> Tensor:
    if isinstance(bucket, Tensor):
        return bucket
    with warnings.catch_warnings():
        # arrays from an object store are read-only; nothing here writes to them
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.from_numpy(bucket)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _some(names: Sequence[str], what: str) -> str:
    shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    return f"{len(names)} {what} ({shown})" if names else f"0 {what}"


def _torn(name: str, what: str) -> str:
    return f"the buckets do not fit their manifest at {name}: {what}; pack and announce the same tensors in one order"
