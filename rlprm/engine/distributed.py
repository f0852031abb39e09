"""Joining and leaving the process group of one role, and global reductions over it."""

from __future__ import annotations

import os
import socket
import sys
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from rlprm.errors import ConfigError, WorkerLost

Device = Literal["cpu", "cuda"]

BACKLOG = 1024  # ranks that may wait in line before rank 0 is ready for them

_reserved: dict[tuple[str, int], socket.socket] = {}


def reserve(host: str) -> int:
    """A port of ``host``, one of this machine's addresses, that nobody can take before :func:`meet` does.

    The process listens on it from now on, so the others may already knock.

    Raises:
        ConfigError: ``host`` is not an address of this machine.
    """
    listener = _listen(host, 0)
    port = int(listener.getsockname()[1])
    _reserved[host, port] = listener
    return port


def meet(host: str, port: int, rank: int, world_size: int, timeout_s: float) -> dist.TCPStore:
    """The store where ``world_size`` processes meet: rank 0 listens on ``host:port``, and on no other address.

    Left to itself the store listens on every address of the machine, whatever its host, and asks nobody who they are.

    Raises:
        ConfigError: rank 0 cannot listen there.
        torch.distributed.DistError: not all came within ``timeout_s`` seconds.
    """
    timeout = timedelta(seconds=timeout_s)
    if rank != 0:
        return dist.TCPStore(host, port, world_size, is_master=False, timeout=timeout)
    listener = _reserved.pop((host, port), None) or _listen(host, port)
    # detached: the store owns the descriptor and closes it
    return dist.TCPStore(host, port, world_size, is_master=True, timeout=timeout, master_listen_fd=listener.detach())


def _listen(host: str, port: int) -> socket.socket:
    listener: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else a port is blocked for a minute after use
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error}; expected an address of this machine and a port that is free "
            "(0: any)"
        ) from error
    return listener


def join(
    rank: int, world_size: int, master_addr: str, master_port: int, *, device: Device = "cpu", timeout_s: float = 120.0
) -> None:
    """Enter the process group of ``world_size`` ranks (gloo on cpu, nccl on cuda) and make DeepSpeed use it.

    Call it once per process, before any learner is built and before anything imports deepspeed. Every process sees
    one device only, so the local rank is always 0. A rank that never comes ends the wait of the others after
    ``timeout_s`` seconds, as does a collective in which a rank is missing.

    Raises:
        ConfigError: impossible rank, deepspeed was imported earlier for another device, or rank 0 cannot listen at
            ``master_addr:master_port`` (it listens there only).
        WorkerLost: the other ranks did not come in time.
    """
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank is {rank} of {world_size}; expected 0 to {world_size - 1}")
    os.environ.update(
        MASTER_ADDR=master_addr,
        MASTER_PORT=str(master_port),
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK="0",
        LOCAL_SIZE="1",
    )
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read by deepspeed at import, and only then
    elif not torch.cuda.is_available():
        raise ConfigError(
            "device is cuda but torch sees no GPU in this process; use device=cpu or give the actor a GPU"
        )
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    imported = "deepspeed" in sys.modules
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name().split(":")[0] != device:
        raise ConfigError(
            f"deepspeed runs on {get_accelerator().device_name()} in this process but device is {device}"
            + ("; it was imported before join(): call join() first" if imported else "; unset DS_ACCELERATOR")
        )
    # An allreduce shortcut for inference whose just-in-time build takes a minute and needs a compiler on PATH.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "gloo" if device == "cpu" else "nccl"
    try:
        dist.init_process_group(
            backend,
            store=meet(master_addr, master_port, rank, world_size, timeout_s),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
    except (dist.DistError, RuntimeError) as error:
        raise WorkerLost(
            f"rank {rank} waited {timeout_s:.0f} s at {master_addr}:{master_port} for {world_size} ranks: {error}; "
            "look at the logs of the other ranks, or raise placement.collective_timeout_s"
        ) from error
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def leave() -> None:
    """Leave the process group; does nothing where none was joined."""
    if not dist.is_initialized():
        return
    import deepspeed.comm

    deepspeed.comm.destroy_process_group()
    deepspeed.comm.comm.cdb = None  # deepspeed would go on using the dead group after another join()


class GroupReduce:
    """Sums and maxima over all ranks of the default group, in float64; the shape and dtype of the input are kept.

    Integers up to 2**53 and counts are exact. Implements :class:`rlprm.roles.Reduce`; every rank must call.

    >>> GroupReduce().sum(torch.tensor([1.0, 2.0])).tolist()      # no group: the identity
    [1.0, 2.0]
    """

    def sum(self, value: Tensor) -> Tensor:
        """``sum over ranks of value``."""
        return _all_reduce(value, dist.ReduceOp.SUM)

    def max(self, value: Tensor) -> Tensor:
        """``max over ranks of value``; a NaN on any rank is NaN on all."""
        if not value.is_floating_point():
            return _all_reduce(value, dist.ReduceOp.MAX)
        # gloo's maximum may drop a NaN, so it travels as a flag of its own
        bad = _all_reduce(value.isnan().double(), dist.ReduceOp.MAX) > 0
        largest = _all_reduce(torch.where(value.isnan(), float("-inf"), value), dist.ReduceOp.MAX)
        return torch.where(bad, float("nan"), largest)


def _all_reduce(value: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value.clone()
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    moved = value.detach().to(device=device, dtype=torch.float64, copy=True).contiguous()
    dist.all_reduce(moved, op=operation)
    return moved.to(device=value.device, dtype=value.dtype)


def world_size() -> int:
    """Ranks of the default group; 1 where none was joined."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Own rank in the default group; 0 where none was joined."""
    return dist.get_rank() if dist.is_initialized() else 0
