"""Before a run on several nodes takes anything: the nodes are there, alike, and see the same files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rlprm.actors import places
from rlprm.actors.nodes import Node, wait_for_nodes
from rlprm.actors.same_everywhere import unequal_versions, unseen_folder, unseen_models
from rlprm.actors.seating import Seating
from rlprm.config import Placement, TrainConfig
from rlprm.errors import ConfigError
from rlprm.placement import Seats
from rlprm.run import factories

SHOWN = 8  # findings in one message; sixteen nodes may all have the same fault


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What every node must see: the folder that learners write to, and the models that each role loads."""

    folder: Path | None
    models: Mapping[str, Mapping[str, str]]  # role (a field of Seats) -> key of the configuration -> folder


def of_training(config: TrainConfig) -> Shared:
    """The files of a training run."""
    policy = {"model.path": config.model.path}
    prm: dict[str, str] = {"model.path": config.model.path} if factories.needs_reference(config) else {}
    if config.critic is not None:
        policy["critic.model"] = config.critic.model
    own = {}
    for name, section in factories.sources(config).items():
        if section.model is not None:
            where = own if factories.own_engine(section) else policy if factories.kind(section).reads_policy else prm
            where[f"streams.{name}.source.model"] = section.model
    engines = {"model.path": config.model.path}
    return Shared(
        folder=Path(config.output_dir), models={"policy": policy, "prm": prm, "engines": engines, "own_engines": own}
    )


def refuse_alone(placement: Placement) -> None:
    """A run of several nodes joins a cluster; it cannot start one.

    Raises:
        ConfigError: it was not told which.
    """
    if placement.nodes > 1 and placement.ray_address is None:
        raise ConfigError(
            f"placement.nodes is {placement.nodes} and placement.ray_address null, which starts Ray on this machine alone; "
            "start the run with rlprm launch (it brings the nodes together), give the address of a cluster that is up in "
            "placement.ray_address, or set placement.nodes=1"
        )


@contextmanager
def seated(placement: Placement, say: Callable[[str], None]) -> Iterator[Seating | None]:
    """The nodes of the cluster that was joined, all that the run needs; None where the run has its own Ray.

    Raises:
        ConfigError: too few after ``placement.start_timeout_s`` seconds; the message says who is missing.
    """
    if placement.ray_address is None:
        yield None
        return
    found = wait_for_nodes(placement.nodes, timeout_s=placement.start_timeout_s, say=say)
    if len(found) > 1:
        say(f"nodes: {', '.join(f'{node.index}: {places.named(node)}' for node in found)}")
    try:
        yield Seating(found)
    finally:
        places.forget()


def require_alike(
    seating: Seating | None, placement: Placement, own_engines: int, shared: Shared, *, prm: bool = True
) -> None:
    """Nothing is started on nodes that differ.

    Raises:
        ConfigError: it does not fit, versions differ, or files are not seen; every finding with its node.
    """
    if seating is None or len(seating.nodes()) == 1:
        return
    seats = seating.preview(placement, own_engines, prm=prm)
    used = [node for node in seating.nodes() if seats.on(node.index)]
    timeout = placement.start_timeout_s
    findings = unequal_versions(used, timeout_s=timeout)
    if not findings and shared.folder is not None:
        findings = unseen_folder(used, shared.folder, timeout_s=timeout)
    if not findings:
        findings = unseen_models(_loading(seating, seats, shared.models), timeout_s=timeout)
    if findings:
        more = f"\n... and {len(findings) - SHOWN} more" if len(findings) > SHOWN else ""
        raise ConfigError("the nodes are not alike:\n" + "\n".join(findings[:SHOWN]) + more)


def _loading(
    seating: Seating, seats: Seats, models: Mapping[str, Mapping[str, str]]
) -> dict[str, tuple[str, Sequence[Node]]]:
    """Key of the configuration -> (folder, nodes whose processes load it)."""
    numbers: dict[str, set[int]] = {}
    folders: dict[str, str] = {}
    for role, wanted in models.items():
        for key, folder in wanted.items():
            folders[key] = folder
            numbers.setdefault(key, set()).update(getattr(seats, role))
    return {key: (folder, [seating.node(number) for number in sorted(numbers[key])]) for key, folder in folders.items()}
