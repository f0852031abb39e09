"""Everything that facts alone decide, for one machine and for a cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlprm.doctor import machine, network, software, storage
from rlprm.doctor.finding import Finding, timed
from rlprm.doctor.wanted import Wanted, device_of


def judged(
    facts: Mapping[str, Mapping[str, Any]],
    wanted: Wanted,
    nodes: Sequence[Any],
    stores: Mapping[str, int | None],
    joined: bool,
) -> list[Finding]:
    """``facts`` by name of the node, the head first; ``nodes`` as the placement counts them.

    ``stores``: bytes of each node's object store; ``joined``: Ray runs already.
    """
    table, device = software.tested(), device_of(wanted, facts)
    seated, found = machine.placed(wanted, nodes) if len(nodes) >= wanted.nodes else (None, [])
    index = {node.name: node.index for node in nodes}
    for node, each in facts.items():
        at = index[node]
        here = None if seated is None else seated.on(at)
        found += [
            *timed(software.python, node, each, device, table),
            *timed(software.versions, node, each, device, table),
            *timed(software.driver, node, each, device, table),
            *timed(machine.gpus, node, each, wanted, machine.gpus_on(seated, at, wanted.placement)),
            *timed(machine.cores, node, each, wanted, here),
            *timed(machine.memory, node, each, wanted, machine.memory_needed(seated, at, wanted, each)),
            *timed(machine.shared_memory, node, each, wanted, stores[node], joined),
            *timed(storage.temporary, node, each),
            *timed(machine.open_files, node, each),
            *timed(machine.programs, node, each, wanted),
        ]
    if len(facts) > 1:
        found += timed(software.equal, facts)
    head = next(iter(facts))
    found += timed(storage.disk, head, facts[head], wanted)
    found += timed(storage.run_folder, facts, wanted.folder)
    found += timed(storage.models, facts, wanted)
    found += timed(storage.data, facts, wanted)
    found += timed(network.token, facts, joined)
    found += timed(network.dashboard, facts)
    found += timed(network.hub, facts)
    return found
