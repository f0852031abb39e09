"""``rlprm prepare``: the data sets and models that a recipe names, fetched or converted once."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rlprm
from rlprm.cli.compose import composed, parsed
from rlprm.cli.train import help_text
from rlprm.config import validated
from rlprm.config_prepare import DatasetSection, ModelSource, PrepareConfig
from rlprm.data import prepare_files as files
from rlprm.data import prepare_hub as hub
from rlprm.data.prepare import Prepared, convert, without_overlap, without_repeats
from rlprm.errors import ConfigError, DataError
from rlprm.paths import recipes_dir
from rlprm.verify.answers import gold_answer, last_boxes

OWN_HELP = False
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line says beside the configuration."""

    source: Path | None  # a folder of what was fetched elsewhere; None: the hub
    check: bool  # look only


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `rlprm prepare`."""
    parser.add_argument("overrides", nargs="*", metavar="key=value | group=option")
    parser.add_argument("-h", "--help", action="store_true", help="groups, options and keys")
    parser.add_argument("--cfg", action="store_true", help="print the resolved configuration and its origins")
    parser.add_argument("--config-dir", type=Path, help="a folder of your own groups and options")
    parser.add_argument(
        "--from", dest="source", type=Path, help="folder of what was fetched elsewhere, instead of the hub"
    )
    parser.add_argument("--only", choices=("data", "models"), help="the other is left alone")
    parser.add_argument("--check", action="store_true", help="say what is there and what is missing; fetch nothing")


def run(options: argparse.Namespace) -> int:
    """Make what is missing; 1 where --check finds something missing."""
    if options.help:
        print(help_text("prepare", options.config_dir, only=("dataset", "recipe")))
        print("--from DIR  --only data|models  --check")
        return 0
    recipe = _brings_everything(options.overrides)
    # such a recipe adds nothing to the rest of the command, which must hold all the same
    rest = [word for word in options.overrides if recipe is None or not word.lstrip("+").startswith("recipe=")]
    configuration = composed("prepare", rest, options.config_dir)
    if options.cfg:
        print(configuration.annotated())
        return 0
    config: PrepareConfig = validated(PrepareConfig, configuration.values)
    if options.source is not None and not options.source.is_dir():
        raise ConfigError(f"--from {options.source} is no folder; expected one of what was fetched elsewhere")
    if not config.data and not config.models:
        if recipe is None:
            raise ConfigError("neither data nor models are named; give recipe=NAME, or +dataset@data.NAME=OPTION")
        print(f"recipe {recipe} needs no data or models from elsewhere")
        return 0
    hub.patient(config.timeout_s)
    asked, lacking = Asked(options.source, options.check), 0
    if options.only != "models":
        lacking += prepare_data(config, asked, print)
    if options.only != "data":
        lacking += prepare_models(config, asked, print)
    return 1 if lacking else 0


def _brings_everything(overrides: Sequence[str]) -> str | None:
    """The recipe that is named, if it has nothing to prepare."""
    named = [each.value() for each in parsed(overrides) if each.key_or_group == "recipe"]
    folder = recipes_dir() / str(named[0]) if len(named) == 1 else None
    if folder is None or folder == recipes_dir() or not folder.is_dir() or (folder / "prepare.yaml").is_file():
        return None
    return folder.name


def prepare_data(config: PrepareConfig, asked: Asked, say: Say) -> int:
    """Evaluation sets first, since training sets lose the questions that are in them; how many are missing (with check).

    Raises:
        DataError: a source that cannot be read, or a file that is not ours to replace.
    """
    root, lacking = Path(config.data_dir), 0
    exams: dict[str, str] = {}  # evaluation set -> digest of its file
    for name, section in sorted(config.data.items(), key=lambda item: item[1].role != "evaluation"):
        file = root / section.output
        compared = exams if section.role == "train" else {}
        settings = files.settings_digest({"section": section.model_dump(), "without": compared})
        found = files.find(file, settings)
        if found.state == "ready":
            say(f"{name}: ready, {found.fingerprint['rows']:,} rows in {file}, written {found.fingerprint['written']}")
        elif asked.check:
            lacking += 1
            say(f"{name}: {'missing' if found.state == 'absent' else 'made with other settings'}, {file}")
        else:
            held_out = {each: files.keys_of(root / config.data[each].output) for each in compared}
            prepared, origin = _prepared(name, section, held_out, asked.source, config.timeout_s)
            said = files.write(file, prepared.rows, {**origin, **_about(prepared), "settings": settings})
            say(f"{name}: {_counts(prepared)} of {origin['source']} -> {file}{_not_pinned(section, origin)}")
            found = files.Found("ready", said)
        if section.role == "evaluation" and found.state == "ready":
            exams[name] = str(found.fingerprint["sha256"])
    return lacking


def prepare_models(config: PrepareConfig, asked: Asked, say: Say) -> int:
    """Every model as a complete folder; how many are missing (with check).

    Raises:
        DataError: a model that cannot be had, or a folder of its name that is no complete model.
    """
    root, lacking = Path(config.models_dir), 0
    for name, section in config.models.items():
        folder = root / section.output
        if folder.exists():
            said = hub.incomplete(folder)
            if said is not None:
                raise DataError(f"{folder} is no complete model: {said}; move it away and prepare again")
            say(f"{name}: ready, {folder}")
        elif asked.check:
            lacking += 1
            say(f"{name}: missing, {folder}")
        elif asked.source is not None:
            source = hub.local_model(asked.source, section.hub, section.output)
            hub.copy_model(section.hub, source, folder)
            say(f"{name}: copied from {source} -> {folder}")
        else:
            say(f"{name}: {_fetched(section, folder, config.timeout_s)}")
    return lacking


def _fetched(section: ModelSource, folder: Path, seconds: float) -> str:
    sha = hub.commit("model", section.hub, section.revision, seconds)
    hub.fetch_model(section.hub, sha, folder)
    pinned = "" if section.revision else f"; its revision is not pinned, this is commit {sha}"
    return f"{section.hub} -> {folder}{pinned}"


def _prepared(
    name: str, section: DatasetSection, held_out: Mapping[str, frozenset[str]], source: Path | None, seconds: float
) -> tuple[Prepared, dict[str, Any]]:
    """The rows of a data set, and where they came from."""
    reading = section.reading()
    origin: dict[str, Any] = {"hub": section.hub, "config_name": section.config_name, "split": section.split}
    records: Iterator[tuple[str, Mapping[str, Any]]]
    if source is None:
        sha = hub.commit("dataset", section.hub, section.revision, seconds)
        origin |= {"source": f"{section.hub}[{section.split}]", "commit": sha}
        records = hub.hub_records(section.hub, section.config_name, section.split, sha, reading.needed())
    else:
        found = files.local_files(source, name, section.hub, section.split, section.files)
        origin |= {"source": f"{found[0]}" + (f" and {len(found) - 1} more" if len(found) > 1 else ""), "commit": None}
        origin["files"] = {str(each): files.digest(each) for each in found}
        records = files.local_records(found, reading.needed())
    prepared = convert(records, reading, boxed=last_boxes, readable=lambda gold: bool(gold_answer(gold)))
    if section.rows is not None and prepared.read != section.rows:
        raise DataError(
            f"{origin['source']} has {prepared.read:,} records and {section.rows:,} were expected; it is another split or has "
            f"changed: look at it, then set data.{name}.rows to {prepared.read} (or null)"
        )
    if section.role == "train":
        prepared = without_overlap(without_repeats(prepared), held_out)
    if not prepared.rows:
        raise DataError(f"nothing of {origin['source']} is left ({_counts(prepared)}); correct its columns and filters")
    return prepared, origin


def _about(prepared: Prepared) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return {"records": prepared.read, "left_out": dict(prepared.dropped), "written": now, "rlprm": rlprm.__version__}


def _counts(prepared: Prepared) -> str:
    left = ", ".join(f"{count:,} {reason}" for reason, count in sorted(prepared.dropped.items()))
    return f"{len(prepared.rows):,} rows" + (f" (left out: {left})" if left else "")


def _not_pinned(section: DatasetSection, origin: Mapping[str, Any]) -> str:
    if section.revision is not None or origin["commit"] is None:
        return ""
    return f"; its revision is not pinned, this is commit {origin['commit']}"
