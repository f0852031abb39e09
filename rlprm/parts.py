"""Pieces that a configuration names by dotted path: found, checked against their signature, and made."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from rlprm.errors import ConfigError


def locate(target: str) -> Callable[..., Any]:
    """The function or class that a dotted path names.

    >>> locate("rlprm.batch.balance").__name__
    'balance'

    Raises:
        ConfigError: the module or the name does not exist.
    """
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"_target_ {target!r} cannot be imported ({error}); expected package.module.name") from error
    if not callable(found):
        raise ConfigError(f"_target_ {target!r} is a {type(found).__name__}; expected a function or class")
    return found


def check_part(part: dict[str, Any]) -> dict[str, Any]:
    """With ``_partial_: true`` YAML gives the keyword-only arguments and the program the positional ones later.

    Without it YAML gives all arguments. Nested parts are checked alike.
    """
    if "_target_" not in part:
        raise ValueError(f"has no _target_ (keys: {', '.join(part) or 'none'}); expected the dotted path of a callable")
    kinds = inspect.Parameter
    from_yaml = {kinds.KEYWORD_ONLY} if part.get("_partial_") else {kinds.KEYWORD_ONLY, kinds.POSITIONAL_OR_KEYWORD}
    parameters = [p for p in inspect.signature(locate(part["_target_"])).parameters.values() if p.kind in from_yaml]
    if unknown := sorted(key for key in part if key.startswith("_") and key not in ("_target_", "_partial_")):
        raise ValueError(
            f"{part['_target_']} has the key {unknown[0]!r}; expected _target_, _partial_ and its arguments"
        )
    given = {key for key in part if not key.startswith("_")}
    known = sorted(p.name for p in parameters)
    missing = sorted({p.name for p in parameters if p.default is p.empty} - given)
    for key in sorted(given - set(known)):
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"; nearest is {near[0]!r}" if near else ""
        raise ValueError(f"{part['_target_']} takes no argument {key!r} (takes: {', '.join(known) or 'none'}){hint}")
    if missing:
        raise ValueError(f"{part['_target_']} needs {', '.join(missing)}; add it to the YAML")
    hints = get_type_hints(_annotated(locate(part["_target_"])), include_extras=True)
    for key in sorted(given):
        if isinstance(part[key], dict) and "_target_" in part[key]:
            check_part(part[key])
        elif key in hints:
            _check_argument(f"{part['_target_']}: {key}", part[key], hints[key])
    return part


def _annotated(target: Any) -> Any:
    """Where the annotations of a callable's arguments are."""
    return target.__init__ if isinstance(target, type) else target


def _check_argument(where: str, value: Any, annotation: Any) -> None:
    """Text is no number and an unknown word no literal; a YAML list may stand for a tuple."""
    try:
        TypeAdapter(annotation, config=ConfigDict(strict=True, arbitrary_types_allowed=True)).validate_json(
            json.dumps(value)
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{where} is {value!r}; {first['msg'][0].lower()}{first['msg'][1:]}") from None


def made(part: Any) -> Any:
    """The object that ``_target_`` names, called with the arguments beside it; nested parts are made first.

    With ``_partial_: true`` a partial of it, or the callable itself where there are no arguments, so that it can be
    compared and travels to other processes as what it is.

    >>> made({"_target_": "rlprm.batch.shards_needed", "_partial_": True})(2, 3)
    6
    """
    if isinstance(part, Mapping):
        arguments = {key: made(value) for key, value in part.items() if key not in ("_target_", "_partial_")}
        if "_target_" not in part:
            return arguments
        target = locate(part["_target_"])
        if not part.get("_partial_"):
            return target(**arguments)
        return functools.partial(target, **arguments) if arguments else target
    return [made(value) for value in part] if isinstance(part, (list, tuple)) else part
