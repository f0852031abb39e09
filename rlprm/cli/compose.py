"""From the command line to a validated configuration, and where each of its values comes from.

Overrides follow Hydra's grammar (``key=value``, ``group=option``, ``+key=value``, ``~key``). ``recipe=NAME`` adds
``recipes/NAME/config.yaml``, and options in that folder hide shipped ones of the same name; ``--config-dir DIR`` does
the same for a folder of the user's own.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hydra import compose
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.initialize import get_gh_backup, restore_gh_from_backup
from hydra.types import RunMode
from hydra.version import setbase
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel

from rlprm.errors import ConfigError
from rlprm.paths import cluster_dir, conf_dir, recipes_dir


@dataclass(frozen=True, slots=True, kw_only=True)
class Composed:
    """Resolved values, and the file or override that set each leaf."""

    values: Mapping[str, Any]
    origins: Mapping[str, str]

    def yaml(self) -> str:
        """The resolved configuration as YAML, for the run folder."""
        return OmegaConf.to_yaml(OmegaConf.create(dict(self.values)))

    def annotated(self) -> str:
        """One line per leaf: ``key = value    # where it comes from``."""
        leaves = list(flat_leaves(self.values))
        width = max(len(f"{key} = {value!r}") for key, value in leaves)
        return "\n".join(f"{f'{key} = {value!r}':<{width}}  # {self.origins.get(key, '?')}" for key, value in leaves)


# `${recipe_dir:NAME}`: where a recipe's own files lie, in a checkout as in an installed wheel
OmegaConf.register_new_resolver("recipe_dir", lambda name: str(recipes_dir() / name), replace=True)


def composed(
    name: str,
    overrides: Sequence[str],
    config_dir: Path | None = None,
    reads: Callable[[str], bool] = lambda key: True,
) -> Composed:
    """The configuration ``conf/<name>.yaml`` under ``overrides``, interpolations resolved.

    ``reads`` says of a dotted key whether the command uses it; leaves that it does not use are left out, and setting
    one on the command line is an error. So a recipe, which is written for `train`, can serve another command too.

    Raises:
        ConfigError: unknown key, option or recipe (with the nearest right one), missing value, bad override, or a key
            on the command line that the command does not read.
    """
    parsed = _parsed(overrides)
    for override in parsed:
        if override.key_or_group.split(".")[0] == "cluster" and name != "launch":
            raise ConfigError(f"{override.input_line}: rlprm {name} runs here; rlprm launch runs it on a cluster")
    named = [override.value() for override in parsed if override.key_or_group == "recipe"]
    if len(named) > 1:
        raise ConfigError(f"recipe is given {len(named)} times ({', '.join(map(str, named))}); choose one")
    arguments = [_recipe(override, name) for override in overrides]
    own = [config_dir] if config_dir else []
    for folder in own:
        if not folder.is_dir():
            raise ConfigError(f"configuration folder {folder} does not exist; expected a folder of YAML groups")
    # a recipe's prepare.yaml has the name of what `rlprm prepare` starts from, and must not hide it
    chosen = [recipes_dir() / str(recipe) for recipe in named if name != "prepare"]
    try:
        with _searching(own + chosen):
            _refuse_new_keys(name, parsed, config_dir, reads)
            config = compose(name, arguments)
            origins = _origins(name, arguments)
            _refuse_unread(name, parsed, config, origins, reads)
            _refuse_missing(config, reads)
            values = OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(name, error, own + chosen, reads)) from None
    assert isinstance(values, dict)
    return Composed(values=_only(values, reads), origins=origins)


def keeps(part: type[BaseModel], whole: type[BaseModel], key: str) -> bool:
    """Does a command that has only ``part`` of training's section ``whole`` keep ``key``?

    What ``whole`` alone knows is left out. What neither knows is kept, so that the schema refuses it by name.

    >>> from rlprm.config import Model, SampledModel
    >>> [keeps(SampledModel, Model, key) for key in ("path", "attention", "pathh")]
    [True, False, True]
    """
    return key in part.model_fields or key not in whole.model_fields


def groups(config_dir: Path | None = None) -> dict[str, list[str]]:
    """Every configuration group and its options, as the folders list them; recipes are a group too."""
    found = options_in([config_dir] if config_dir else [])
    found["recipe"] = sorted(file.parent.name for file in recipes_dir().glob("*/config.yaml"))
    return dict(sorted(found.items()))


def options_in(first: Sequence[Path]) -> dict[str, list[str]]:
    """Groups and options of ``conf/`` and of the folders ``first``."""
    found: dict[str, set[str]] = {}
    for root in (*first, conf_dir()):
        for file in root.rglob("*.yaml"):
            if file.parent != root:
                found.setdefault(str(file.parent.relative_to(root)), set()).add(file.stem)
    found.setdefault("cluster", set()).update(file.stem for file in cluster_dir().glob("*.yaml"))
    return {group: sorted(options) for group, options in found.items()}


def parsed(overrides: Sequence[str]) -> list[Override]:
    """Each override by itself, so that a bad one is named.

    Raises:
        ConfigError: not of Hydra's grammar.
    """
    parser, found = OverridesParser.create(), []
    for line in overrides:
        try:
            found.append(parser.parse_override(line))
        except HydraException as error:
            raise ConfigError(
                f"{line!r} cannot be read ({str(error).splitlines()[0]}); expected key=value, group=option, +key=value "
                "or ~key, with quotes around values that hold commas, brackets or braces"
            ) from None
    return found


def _parsed(overrides: Sequence[str]) -> list[Override]:
    """As :func:`parsed`, for one configuration.

    Raises:
        ConfigError: not of Hydra's grammar, or a sweep.
    """
    found = parsed(overrides)
    for line, override in zip(overrides, found, strict=True):
        if override.is_sweep_override():
            raise ConfigError(
                f"{line!r} gives several values; write a list as key=[1,2] and text as key=\"'1,2'\" (rlprm train runs "
                "several seeds with --seeds, rlprm ablate compares several values)"
            )
    return found


def _recipe(override: str, name: str) -> str:
    key, _, value = override.partition("=")
    if key not in ("recipe", "+recipe"):
        return override
    known = groups()["recipe"]
    if value not in known:
        raise ConfigError(f"recipe {value!r} does not exist (there are: {', '.join(known)}){_nearest(value, known)}")
    file = {"sft": "warm_up", "prm": "step_labels", "prepare": "prepare"}.get(name, "config")
    # the name stands on the right, where Hydra's grammar allows the dots of `qwen2.5_0.5b`
    return f"+recipes@_global_={value}/{file}"


def flat_leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from flat_leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def _only(values: Mapping[str, Any], reads: Callable[[str], bool], prefix: str = "") -> dict[str, Any]:
    """The leaves that ``reads`` accepts, in the sections they stand in; sections that become empty are left out."""
    kept: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            inner = _only(value, reads, f"{path}.")
            if inner:
                kept[key] = inner
        elif reads(path):
            kept[key] = value
    return kept


def _refuse_missing(config: DictConfig, reads: Callable[[str], bool]) -> None:
    leaves = flat_leaves(OmegaConf.to_container(config, resolve=False))
    missing = sorted(key for key, value in leaves if value == "???" and reads(key))
    if missing:
        raise ConfigError(
            f"no value for {', '.join(missing)}; give it on the command line ({missing[0]}=...) or choose a recipe"
        )


def _refuse_new_keys(
    name: str, overrides: Sequence[Override], config_dir: Path | None, reads: Callable[[str], bool]
) -> None:
    """``+key=value`` may add an option or an entry of a section, but no key beside those that the schema knows."""
    known = None
    for override in overrides:
        key = override.key_or_group
        if not override.is_add() or "." in key or "/" in key or override.package is not None:
            continue
        known = known or {*groups(config_dir), *OmegaConf.to_container(compose(name), resolve=False)}
        if key not in known:
            candidates = sorted(each for each in known if reads(each) or each == "recipe")
            raise ConfigError(f"{key}: there is no such key or group{_nearest(key, candidates)}")


def _refuse_unread(
    name: str,
    overrides: Sequence[Override],
    config: DictConfig,
    origins: Mapping[str, str],
    reads: Callable[[str], bool],
) -> None:
    """What the command line sets must be read, or be where something that is read takes its value from."""
    leaves = [(key, value) for key, value in flat_leaves(OmegaConf.to_container(config, resolve=False)) if reads(key)]
    used = {key for key, _ in leaves}
    used |= {found for _, value in leaves if isinstance(value, str) for found in re.findall(r"\$\{([^}:]+)\}", value)}
    for override in overrides:
        target = override.package if override.package is not None else override.key_or_group
        met = any(f"{key}.".startswith(f"{target}.") or f"{target}.".startswith(f"{key}.") for key in used)
        # an option that sets keys all over (a method) is no section of its own: what counts is what its file has set
        option = f"{override.key_or_group}/{override.value()}.yaml"
        met = met or any(option == origin and key in used for key, origin in origins.items())
        if not (met or override.is_delete() or override.key_or_group == "recipe"):
            raise ConfigError(f"{override.input_line}: rlprm {name} does not read {target}; leave it out")


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1) or [each for each in known if word and word in each]
    return f"; nearest is {near[0]!r}" if near else ""


@contextmanager
def _searching(first: Sequence[Path]) -> Iterator[None]:
    """Hydra over ``conf/`` and ``recipes/``; options in the folders ``first`` hide shipped ones of the same name.

    Hydra's own ways to add a folder put it behind the main one, so that a recipe could not bring its own variant of an
    option that the methods name.
    """
    saved = get_gh_backup()
    setbase("1.3")
    path = create_config_search_path(str(conf_dir()))
    for folder in reversed(first):
        path.prepend(provider="own options", path=f"file://{folder.resolve()}")
    with TemporaryDirectory() as shipped:
        # `cluster` and `recipes` are groups of a folder that holds nothing else: to Hydra every folder beside them would be
        # a group too, and `runs=...` would choose an option of the folder of runs
        for group in (cluster_dir(), recipes_dir()):
            (Path(shipped) / group.name).symlink_to(group.resolve())
        # behind "main" but before "schema", which Hydra wants to be the last
        path.prepend(provider="recipes", path=f"file://{recipes_dir().resolve()}", anchor="schema")
        path.prepend(provider="shipped", path=f"file://{shipped}", anchor="schema")
        GlobalHydra.instance().clear()
        Hydra.create_main_hydra2(task_name="rlprm", config_search_path=path)
        try:
            yield
        finally:
            restore_gh_from_backup(saved)


def _origins(name: str, arguments: Sequence[str]) -> dict[str, str]:
    """Replay the defaults list: the last file that has a leaf has set it, then the overrides."""
    loader = GlobalHydra.instance().config_loader()
    defaults = loader.compute_defaults_list(name, list(arguments), RunMode.RUN)
    _, repository = loader._parse_overrides_and_create_caching_repo(name, list(arguments))  # type: ignore[attr-defined]
    origins: dict[str, str] = {}
    for default in defaults.defaults:
        if default.config_path is None or default.config_path.startswith("hydra/"):
            continue
        loaded = repository.load_config(default.config_path)
        content = OmegaConf.to_container(loaded.config, resolve=False)
        prefix = default.package or ""
        for key, _ in flat_leaves(content, prefix):
            origins[key] = f"{default.config_path.removeprefix('recipes/')}.yaml"
    chosen = set(options_in([]))
    for line in arguments:
        override = OverridesParser.create().parse_override(line)
        if override.key_or_group in chosen and override.value() is not None:
            continue  # an option was chosen: its file has set the values
        if override.package is None and "/" not in override.key_or_group:
            prefix = override.key_or_group
            for key in [key for key in origins if key == prefix or key.startswith(prefix + ".")] or [prefix]:
                origins[key] = f"command line: {line}"
    return origins


def _explain(name: str, error: Exception, first: Sequence[Path], reads: Callable[[str], bool]) -> str:
    """Hydra's words in one sentence, with the nearest key or option that exists."""
    text = str(error).strip()
    if option := re.search(r"Could not find '([^']+)/([^'/]+)'", text):
        group, asked = option.groups()
        known = options_in(first).get(group, [])
        return f"{group}={asked}: there is no such option (there are: {', '.join(known)}){_nearest(asked, known)}"
    key = re.search(r"Could not (?:override|delete)[^']*'([^'=]+)", text) or re.search(r"Key '([^']+)' is not in", text)
    if key is None:
        return " ".join(line.strip() for line in text.splitlines() if "hydra.cc" not in line)
    asked = key.group(1)
    with _searching(first):
        config = compose(name)
    leaves = [leaf for leaf, _ in flat_leaves(OmegaConf.to_container(config, resolve=False)) if reads(leaf)]
    sections = sorted({".".join(leaf.split(".")[:depth]) for leaf in leaves for depth in range(1, leaf.count(".") + 2)})
    places = [section for section in sections if section.endswith(f".{asked}")]
    if places and asked in groups():
        where = f"for example {asked}@{places[0]}=... (also: {', '.join(places)})"
        return f"{asked}: say where this group is to go, {where}"
    near = _nearest(asked, sections)
    top = ", ".join(sorted({leaf.split(".")[0] for leaf in leaves}))
    return f"{asked}: there is no such key in conf/{name}.yaml or the chosen options" + (near or f" (top level: {top})")
