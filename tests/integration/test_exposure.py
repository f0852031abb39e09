"""Nothing of a run on one machine can be reached from another: whatever listens, listens on loopback."""

from __future__ import annotations

import io
import ipaddress
import os
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest
from rich.console import Console

from rlprm import driver
from rlprm.data.tasks.chain_arithmetic import write_model_folder
from rlprm.run import training
from rlprm.run.progress import Progress
from tests.integration.support import PRM, TRANSFORMERS, configured

pytestmark = pytest.mark.integration


def listening() -> dict[tuple[str, int], str]:
    """(address, port) of every listening TCP socket of this process and all below it, and whose it is."""
    found = {}
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            name = Path(process.cmdline()[0].split()[0]).name
            for connection in process.net_connections(kind="tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found[connection.laddr.ip, connection.laddr.port] = name
        except (psutil.NoSuchProcess, IndexError):  # it has ended meanwhile; a zombie has no command
            continue
    return found


def on_loopback(address: str) -> bool:
    """Also ::ffff:127.0.0.1, which is how an IPv6 socket spells IPv4's."""
    found = ipaddress.ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def test_a_run_on_one_machine_listens_on_loopback_only(ray_once: None, tmp_path: Path) -> None:
    write_model_folder(tmp_path / "model", 0, hidden=32, layers=1, heads=1, mlp=64, context=128)
    config, made = configured(
        tmp_path / "run", str(tmp_path / "model"), *PRM, *TRANSFORMERS, "placement=cpu_two_ranks",
        "placement.weight_transport=gloo", "steps=1",
    )  # fmt: skip
    before = listening()
    seen: list[dict[tuple[str, int], str]] = []

    def looked(run: driver.Run) -> None:
        run.transfer.publish(run.policy, run.rollouts)  # joins the learner and the engine
        seen.append(listening())

    with patch.object(driver, "train", looked):
        training.train(config, made, Progress(Console(file=io.StringIO()), patience=1e9))
    (during,) = seen
    exposed = {where: whose for where, whose in during.items() if not on_loopback(where[0])}
    assert exposed == {}
    # ... and they were seen: Ray's, one of each learner process, and three meeting places (policy, PRM, weights)
    assert {"gcs_server", "raylet"} <= set(before.values())
    assert len([where for where, whose in during.items() if where not in before and whose == "ray::Worker"]) >= 3 + 3


def test_ray_puts_its_own_view_of_loopback_back(ray_once: None) -> None:
    import ray
    from ray._private import services

    assert ray.util.get_node_ip_address() == "127.0.0.1"
    assert services.resolve_ip_for_localhost.__module__ == services.__name__
    assert "GLOO_SOCKET_IFNAME" not in os.environ  # only the actors of the run are told
