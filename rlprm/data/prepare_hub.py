"""The Hugging Face hub, as preparing sees it: the commit first, then the data set or the model of that commit.

Nothing that is fetched is executed: `datasets` runs no code of a data set, and of a model only safetensors, JSON and
text files are taken.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlprm.data.prepare_files import roots
from rlprm.errors import DataError

# Weights as safetensors, tokenizers and configuration; pickled weights (.bin, .pt) stay where they are.
MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


def patient(seconds: float) -> None:
    """Set how long the hub's libraries wait for an answer, unless the environment says so; before they are imported."""
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        os.environ.setdefault(name, str(max(1, round(seconds))))
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def commit(kind: str, name: str, revision: str | None, seconds: float) -> str:
    """The commit that ``revision`` (null: the newest) stands for now.

    Raises:
        DataError: the hub is switched off, cannot be reached, or has no such repository or revision.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        raise DataError(f"{name} is to be fetched, and HF_HUB_OFFLINE is set; unset it, or {elsewhere(kind, name)}")
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        ask = api.dataset_info if kind == "dataset" else api.model_info
        found = ask(name, revision=revision, timeout=seconds)
    except HfHubHTTPError as error:
        raise DataError(
            f"the hub has no {kind} {name!r} at revision {revision or 'main'!r} for this account ({_first_line(error)}); "
            "correct the name or the revision, accept its terms on the hub, or set HF_TOKEN where it is not public"
        ) from error
    except _unreachable() as error:
        raise DataError(
            f"{constants.ENDPOINT} did not answer within {seconds:g} s ({_first_line(error)}), and {name} is not here; "
            f"{elsewhere(kind, name)}"
        ) from error
    return str(found.sha)


def elsewhere(kind: str, name: str) -> str:
    """How to do without the hub on this machine.

    >>> elsewhere("model", "owner/name")
    'run `hf download owner/name --local-dir DIR/owner/name` where the hub is, bring DIR here and give --from DIR'
    """
    told = " --repo-type dataset" if kind == "dataset" else ""
    return f"run `hf download {name}{told} --local-dir DIR/{name}` where the hub is, bring DIR here and give --from DIR"


def hub_records(
    name: str, config_name: str | None, split: str, sha: str, columns: Sequence[str]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """``(where, record)`` of a data set at a commit.

    Raises:
        DataError: it cannot be loaded, or has not this split or these columns.
    """
    import datasets

    where = f"{name}[{split}]"
    try:
        found = datasets.load_dataset(name, config_name, split=split, revision=sha)
    except (*_unreachable(), ValueError, RuntimeError) as error:
        raise DataError(
            f"{where} at {sha[:12]} cannot be loaded: {_first_line(error)}; check config_name and split"
        ) from error
    for index, record in enumerate(found.select_columns(roots(columns, found.column_names, where))):
        yield f"{where}[{index}]", record


def fetch_model(name: str, sha: str, folder: Path) -> None:
    """The model at a commit as ``folder``, which is there only when it is complete; a broken fetch is continued.

    Raises:
        DataError: it cannot be fetched, or has no weights as safetensors.
    """
    from huggingface_hub import snapshot_download

    partial = folder.with_name(f".{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        snapshot_download(name, revision=sha, local_dir=partial, allow_patterns=list(MODEL_FILES))
    except (*_unreachable(), ValueError) as error:
        raise DataError(
            f"{name} cannot be fetched ({_first_line(error)}); the same command continues where it stopped"
        ) from error
    _finish(name, partial, folder)


def copy_model(name: str, source: Path, folder: Path) -> None:
    """A model folder that was fetched elsewhere, copied as ``folder``.

    Raises:
        DataError: it cannot be copied, or is not complete.
    """
    said = incomplete(source)
    if said is not None:
        raise DataError(f"{source} is no complete model folder: {said}; fetch it again ({elsewhere('model', name)})")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        for pattern in MODEL_FILES:
            for file in sorted(source.glob(pattern)):
                shutil.copyfile(file, partial / file.name)
    except OSError as error:
        raise DataError(
            f"{source} cannot be copied to {folder} ({error}); make room, or set models_dir to where it lies"
        ) from error
    _finish(name, partial, folder)


def local_model(folder: Path, name: str, output: str) -> Path:
    """Where a model lies below ``folder``: ``owner/name``, ``name`` or the name that the recipe gives it.

    Raises:
        DataError: nowhere.
    """
    places = list(dict.fromkeys([folder / name, folder / name.rpartition("/")[2], folder / output]))
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise DataError(
        f"{folder} holds nothing of model {name}; expected a folder with config.json, one of "
        f"{', '.join(str(place) for place in places)}"
    )


def incomplete(folder: Path) -> str | None:
    """What a model folder lacks; None when engines and learners can read it."""
    if not (folder / "config.json").is_file():
        return "it has no config.json"
    if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return "it has no tokenizer (tokenizer.json, tokenizer.model or vocab.json)"
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        whole = sorted(folder.glob("*.safetensors"))
        return None if whole else "it has no weights as safetensors (pickled weights are not read)"
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{index.name} cannot be read ({error})"
    lacking = [shard for shard in shards if not (folder / shard).is_file()]
    return f"{len(lacking)} of {len(shards)} weight files are missing, first {lacking[0]}" if lacking else None


def _finish(name: str, partial: Path, folder: Path) -> None:
    said = incomplete(partial)
    if said is not None:
        raise DataError(f"{name} was fetched to {partial}, and {said}; fetch it again, or take another model")
    shutil.rmtree(partial / ".cache", ignore_errors=True)  # the hub's notes about an unfinished fetch
    os.replace(partial, folder)


def _unreachable() -> tuple[type[BaseException], ...]:
    """Network errors, of whichever HTTP client this version of the hub's library has loaded."""
    clients = {"httpx": "HTTPError", "httpx2": "HTTPError", "requests": "RequestException"}
    return (OSError, *(getattr(sys.modules[name], error) for name, error in clients.items() if name in sys.modules))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
