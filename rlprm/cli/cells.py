"""From sweeps on the command line to cells: the configurations that an ablation compares.

Hydra's own sweep syntax: ``key=a,b``, ``key=choice(a,b)``, ``key=range(1,4)``, ``group=glob(*,exclude=raw)``. Every
combination of swept values is a cell; cells that are not of one grid are given one by one.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.types import Glob, Override, ValueType
from hydra.errors import HydraException

from rlprm.cli.compose import groups, options_in, parsed
from rlprm.errors import ConfigError
from rlprm.paths import recipes_dir

STREAM_GROUPS = ("source", "merge", "normalizer", "estimator", "gate")
# What the ablation sets itself in every run, and so nobody else may.
SET_HERE = {
    "seed": "give the seeds of all cells with seeds=",
    "name": "the name of a run is its cell's; name the ablation with name=",
    "resume": "an ablation always goes on where it stopped",
    "tracker.group": "the group of an ablation's runs is its name",
}
# a word of --cell; quotations, which are Hydra's and stay, may hold spaces
_WORD = re.compile(r"""(?:[^\s'"]|'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")+""")
_NAME = re.compile(r"\w[\w.+=,-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One configuration: what it adds to the overrides that all cells share."""

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """What all cells share, and each one's own part."""

    shared: tuple[str, ...]
    cells: tuple[Cell, ...]

    def overrides(self, cell: Cell) -> list[str]:
        """Everything that makes the cell's configuration; what comes later wins."""
        return [*self.shared, *cell.overrides]

    def named(self, name: str | None) -> Cell:
        """The cell of that name; None: the first.

        Raises:
            ConfigError: there is no such cell (with the nearest one).
        """
        for cell in self.cells:
            if name is None or cell.name == name:
                return cell
        known = [cell.name for cell in self.cells]
        near = difflib.get_close_matches(str(name), known, n=1)
        raise ConfigError(
            f"there is no cell {name!r} (there are: {', '.join(known)})" + (f"; nearest is {near[0]!r}" if near else "")
        )


def split_own(words: Sequence[str], own: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides of the ablation's keys ``own``, and the others.

    ``seeds=3,7`` means the list, for the ablation sweeps none of its own keys.

    >>> split_own(["seeds=3,7", "normalizer=raw,batch_mean", "level=0.5"], ["seeds", "level"])
    (['seeds=[3,7]', 'level=0.5'], ['normalizer=raw,batch_mean'])

    Raises:
        ConfigError: a word that is not of Hydra's grammar.
    """
    mine, others = [], []
    for word, override in zip(words, parsed(words), strict=True):
        key = override.key_or_group
        if override.package is not None or key.split(".")[0] not in own:
            others.append(word)
        elif key == "seeds" and override.value_type == ValueType.SIMPLE_CHOICE_SWEEP:
            mine.append(f"seeds=[{','.join(override.sweep_string_iterator())}]")
        else:
            mine.append(word)
    return mine, others


def cells_of(
    words: Sequence[str], explicit: Mapping[str, Sequence[str]], *, stream: str, config_dir: Path | None = None
) -> Cells:
    """The grid of all swept values in ``words``, then the ``explicit`` cells; words without a sweep are shared.

    A bare ``source=``, ``merge=``, ``normalizer=``, ``estimator=`` or ``gate=`` is that piece of ``stream``.

    >>> found = cells_of(["steps=2", "normalizer=raw,batch_mean"], {"oracle": ["method=oracle"]}, stream="process")
    >>> found.shared, [cell.name for cell in found.cells], found.cells[0].overrides
    (('steps=2',), ['raw', 'batch_mean', 'oracle'], ('normalizer@streams.process.normalizer=raw',))

    Raises:
        ConfigError: nothing to compare, a sweep that cannot be listed, a name that is no folder's or given twice, or
            a key that the ablation sets itself.
    """
    found = parsed(words)
    swept = [override for override in found if override.is_sweep_override()]
    plain = [override for override in found if not override.is_sweep_override()]
    shared = tuple(_line(override, stream, _value(override)) for override in plain)
    cells = [] if not swept else _grid(swept, _options_of(plain, config_dir), stream)
    for name, lines in explicit.items():
        own = parsed(lines)
        for line, override in zip(lines, own, strict=True):
            if override.is_sweep_override():
                raise ConfigError(f"cell {name!r}: {line!r} gives several values; a cell is one configuration")
        cells.append(Cell(name=name, overrides=tuple(_line(each, stream, _value(each)) for each in own)))
    if not cells:
        raise ConfigError(
            "nothing to compare: give some key or group several values (normalizer=raw,group_zscore), or cells with --cell"
        )
    for cell in cells:
        if not _NAME.fullmatch(cell.name) or len(cell.name) > 120:
            raise ConfigError(
                f"cell {cell.name!r} cannot be a folder's name; use letters, digits and _.+=,- (at most 120 characters), "
                "and --cell 'NAME: overrides' for values that are not such a name"
            )
    repeated = [name for name, count in Counter(cell.name for cell in cells).items() if count > 1]
    if repeated:
        raise ConfigError(
            f"there are several cells {repeated[0]!r}; give each its own name with --cell 'NAME: overrides'"
        )
    return Cells(shared=shared, cells=tuple(cells))


def explicit_cells(given: Sequence[str], file: Path | None) -> dict[str, list[str]]:
    """Cells of ``--cell "NAME: override override"`` and of a YAML file ``NAME: [override, ...]``, the file's first.

    >>> explicit_cells(["trusted: method=prime_as_written gate=trust"], None)
    {'trusted': ['method=prime_as_written', 'gate=trust']}

    Raises:
        ConfigError: not of that form, or a name twice.
    """
    cells = {} if file is None else _from_file(file)
    for text in given:
        name, colon, rest = text.partition(":")
        if not colon or not name.strip():
            raise ConfigError(f"--cell {text!r}; expected 'NAME: key=value group=option ...'")
        if name.strip() in cells:
            raise ConfigError(f"there are several cells {name.strip()!r}; give each its own name")
        if _WORD.sub("", rest).strip():
            raise ConfigError(f"--cell {text!r} cannot be read: a quotation is not closed")
        cells[name.strip()] = _WORD.findall(rest)
    return cells


def _from_file(file: Path) -> dict[str, list[str]]:
    expected = "expected YAML of the form NAME: [key=value, group=option, ...]"
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--cells {file} cannot be read ({error}); {expected}") from None
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"--cells {file} holds a {type(content).__name__}; {expected}")
    for name, lines in content.items():
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            raise ConfigError(f"--cells {file}: {name!r} is {lines!r}; {expected}")
    return {str(name): list(lines) for name, lines in content.items()}


def _grid(swept: Sequence[Override], options: Mapping[str, Sequence[str]], stream: str) -> list[Cell]:
    short = Counter(_short(override) for override in swept)
    axes = [
        (override, _short(override) if short[_short(override)] == 1 else override.get_key_element(), values)
        for override in swept
        for values in [_values(override, options)]
    ]
    cells = []
    for chosen in itertools.product(*(values for _, _, values in axes)):
        parts = [f"{label}={_clean(value)}" for (_, label, _), value in zip(axes, chosen, strict=True)]
        cells.append(
            Cell(
                name=_clean(chosen[0]) if len(axes) == 1 else ",".join(parts),
                overrides=tuple(
                    _line(override, stream, value) for (override, _, _), value in zip(axes, chosen, strict=True)
                ),
            )
        )
    return cells


def _values(override: Override, options: Mapping[str, Sequence[str]]) -> list[str]:
    """What a sweep lists, each as it is written on a command line."""
    line = override.input_line
    if override.value_type == ValueType.GLOB_CHOICE_SWEEP:
        chosen: Any = override.value()
        assert isinstance(chosen, Glob)
        if override.key_or_group not in options:
            raise ConfigError(f"{line}: glob lists the options of a group, and {override.key_or_group!r} is none")
        values = chosen.filter(list(options[override.key_or_group]))
    elif override.is_discrete_sweep():
        try:
            values = [str(value) for value in override.sweep_string_iterator()]
        except HydraException as error:
            raise ConfigError(f"{line}: {error}") from None
    else:
        raise ConfigError(f"{line}: an interval has no values to run; list them (key=1,2,3) or use range(1,4)")
    if not values:
        raise ConfigError(f"{line}: there is no value; nothing fits")
    return values


def _options_of(plain: Sequence[Override], config_dir: Path | None) -> dict[str, list[str]]:
    """Every group's options, those that a shared recipe brings included."""
    recipes = [recipes_dir() / str(each.value()) for each in plain if each.key_or_group == "recipe"]
    first = [*([config_dir] if config_dir else []), *(folder for folder in recipes if folder.is_dir())]
    return {**groups(config_dir), **options_in(first)}


def _line(override: Override, stream: str, value: str | None) -> str:
    """The override with one value; pieces of a stream get their place."""
    key = override.key_or_group
    if override.package is None and key in SET_HERE:
        raise ConfigError(f"{override.input_line}: leave it out; {SET_HERE[key]}")
    element = override.get_key_element()
    if override.package is None and key in STREAM_GROUPS:
        element = f"{element}@streams.{stream}.{key}"
    return element if value is None else f"{element}={value}"


def _value(override: Override) -> str | None:
    """As on the command line; None where a deletion has none."""
    text = override.input_line or ""
    return text.partition("=")[2] if "=" in text else None


def _short(override: Override) -> str:
    return re.split(r"[./]", override.key_or_group)[-1]


def _clean(value: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", value).strip("-") or "empty"
