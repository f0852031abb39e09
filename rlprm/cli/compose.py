"""From the command line to a validated configuration, and where each of its values comes from.

Overrides follow Hydra's grammar (``key=value``, ``group=option``, ``+key=value``, ``~key``). ``recipe=NAME`` adds
``recipes/NAME/config.yaml``, and options in that folder hide shipped ones of the same name; ``--config-dir DIR`` does
the same for a folder of the user's own.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.initialize import get_gh_backup, restore_gh_from_backup
from hydra.types import RunMode
from hydra.version import setbase
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlprm.errors import ConfigError
from rlprm.paths import conf_dir, recipes_dir


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
        leaves = list(_leaves(self.values))
        width = max(len(f"{key} = {value!r}") for key, value in leaves)
        return "\n".join(f"{f'{key} = {value!r}':<{width}}  # {self.origins.get(key, '?')}" for key, value in leaves)


# `${recipe_dir:NAME}`: where a recipe's own files lie, in a checkout as in an installed wheel
OmegaConf.register_new_resolver("recipe_dir", lambda name: str(recipes_dir() / name), replace=True)


def composed(name: str, overrides: Sequence[str], config_dir: Path | None = None) -> Composed:
    """The configuration ``conf/<name>.yaml`` under ``overrides``, interpolations resolved.

    Raises:
        ConfigError: unknown key, option or recipe (with the nearest right one), missing value, bad override.
    """
    arguments = [_recipe(override) for override in overrides]
    own = [config_dir] if config_dir else []
    chosen = [recipes_dir() / override.partition("=")[2] for override in overrides if override.startswith("recipe=")]
    for folder in own:
        if not folder.is_dir():
            raise ConfigError(f"configuration folder {folder} does not exist; expected a folder of YAML groups")
    try:
        with _searching(own + chosen):
            config = compose(name, arguments)
            origins = _origins(name, arguments)
            _refuse_missing(config)
            values = OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(name, error)) from None
    assert isinstance(values, dict)
    return Composed(values=values, origins=origins)


def groups(config_dir: Path | None = None) -> dict[str, list[str]]:
    """Every configuration group and its options, as the folders list them; recipes are a group too."""
    found: dict[str, list[str]] = {}
    for root in ([config_dir] if config_dir else []) + [conf_dir()]:
        for file in sorted(root.rglob("*.yaml")):
            if file.parent != root:
                found.setdefault(str(file.parent.relative_to(root)), []).append(file.stem)
    found["recipe"] = sorted(file.parent.name for file in recipes_dir().glob("*/config.yaml"))
    return dict(sorted(found.items()))


def _recipe(override: str) -> str:
    key, _, value = override.partition("=")
    if key not in ("recipe", "+recipe"):
        return override
    known = groups()["recipe"]
    if value not in known:
        near = difflib.get_close_matches(value, known, n=1)
        hint = f"; nearest is {near[0]!r}" if near else ""
        raise ConfigError(f"recipe {value!r} does not exist (there are: {', '.join(known)}){hint}")
    return f"+{value}@_global_=config"


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def _refuse_missing(config: DictConfig) -> None:
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(
            f"no value for {', '.join(missing)}; give it on the command line ({missing[0]}=...) or choose a recipe"
        )


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
    # behind "main" but before "schema", which Hydra wants to be the last
    path.prepend(provider="recipes", path=f"file://{recipes_dir().resolve()}", anchor="schema")
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
        for key, _ in _leaves(content, prefix):
            origins[key] = f"{default.config_path}.yaml"
    for line in arguments:
        override = OverridesParser.create().parse_override(line)
        if override.package is None and "/" not in override.key_or_group:
            prefix = override.key_or_group
            for key in [key for key in origins if key == prefix or key.startswith(prefix + ".")] or [prefix]:
                origins[key] = f"command line: {line}"
    return origins


def _explain(name: str, error: Exception) -> str:
    """Hydra's words, plus the nearest key that exists."""
    text = str(error).strip()
    found = re.search(r"Key '([^']+)' is not in struct|Could not override '([^']+)'", text)
    if not found:
        return text
    wrong = re.search(r"Could not override '([^']+)'", text)
    asked = (wrong or found).group(1)
    with _searching([]):
        config = compose(name)
    known = [key for key, _ in _leaves(OmegaConf.to_container(config, resolve=False))]
    sections = sorted({".".join(key.split(".")[:depth]) for key in known for depth in range(1, key.count(".") + 2)})
    near = difflib.get_close_matches(asked, sections, n=1)
    return f"{asked}: there is no such key in conf/{name}.yaml or the chosen options" + (
        f"; nearest is {near[0]!r}" if near else f" (top level: {', '.join(sorted({k.split('.')[0] for k in known}))})"
    )
