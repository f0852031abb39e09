"""Which network interface a process talks through: the one that holds its node's own address."""

from __future__ import annotations

import os
from collections.abc import Mapping

import psutil
import ray


def use_own_interface() -> None:
    """Tell gloo, NCCL and vLLM, before they open a socket, to use the address by which Ray knows this node.

    Left alone gloo listens on the address that the machine's name stands for, which is often loopback: no other node
    would reach it. What the user has set stays.
    """
    for name, value in variables(ray.util.get_node_ip_address(), addresses()).items():
        os.environ.setdefault(name, value)


def addresses() -> dict[str, list[str]]:
    """Addresses of each network interface of this machine."""
    return {name: [each.address for each in found] for name, found in psutil.net_if_addrs().items()}


def variables(address: str, interfaces: Mapping[str, list[str]]) -> dict[str, str]:
    """Environment that keeps gloo, NCCL and vLLM on the interface of ``address``.

    >>> variables("10.0.0.2", {"lo": ["127.0.0.1"], "eth1": ["10.0.0.2"]})
    {'VLLM_HOST_IP': '10.0.0.2', 'GLOO_SOCKET_IFNAME': 'eth1', 'NCCL_SOCKET_IFNAME': '=eth1'}

    An address that no interface holds (one that is translated on the way) says nothing of interfaces.

    >>> variables("203.0.113.1", {"lo": ["127.0.0.1"]})
    {}
    """
    holding = [name for name, held in interfaces.items() if address in held]
    if not holding:
        return {}
    # "=": NCCL would take eth10 for eth1 as well
    return {"VLLM_HOST_IP": address, "GLOO_SOCKET_IFNAME": holding[0], "NCCL_SOCKET_IFNAME": f"={holding[0]}"}
