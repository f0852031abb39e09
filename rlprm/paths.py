"""Where the configuration and the recipes lie: beside the package in a checkout, inside it in an installed wheel."""

from __future__ import annotations

from pathlib import Path

from rlprm.errors import ConfigError

PACKAGE = Path(__file__).resolve().parent


def conf_dir() -> Path:
    """The folder of Hydra groups.

    >>> (conf_dir() / "train.yaml").is_file()
    True

    Raises:
        ConfigError: neither a checkout nor a complete wheel.
    """
    return _locate("conf")


def recipes_dir() -> Path:
    """The folder of recipes, one sub-folder each.

    Raises:
        ConfigError: neither a checkout nor a complete wheel.
    """
    return _locate("recipes")


def cluster_dir() -> Path:
    """The folder of cluster options, pinned environments, and shapes of models and GPUs.

    Raises:
        ConfigError: neither a checkout nor a complete wheel.
    """
    return _locate("cluster")


def _locate(name: str, package: Path = PACKAGE) -> Path:
    # The packaged copy comes first: in site-packages a neighbour called `conf` belongs to somebody else.
    candidates = [package / "_shipped" / name, package.parent / name]
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    raise ConfigError(
        f"found no folder of {name}: expected {candidates[0]} (installed package) or {candidates[1]} (checkout); "
        "install rlprm again, or run it from a complete checkout"
    )
