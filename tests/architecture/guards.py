"""What the laws of the design look like to a machine. Each guard takes a repository root and lists what breaks the law.

A violation is one line, ``path:line: what was found; what to do``. The tests beside this file run each guard on the
repository (nothing may be found) and on a planted violation (it must be found).
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.architecture.reading import (
    accepts,
    dedented,
    field_default,
    identifiers,
    imported,
    is_bare_field,
    is_shift,
    metric_literals,
    modules,
    parse,
    python_files,
    relative,
    schema_classes,
    unsafe,
    within,
    yaml_keys,
)

MAX_LINES = 400
MAX_DRIVER_LINES = 150
TOP_LEVEL = {
    *("README.md", "LICENSE", "NOTICE", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml"),
    *("rlprm", "conf", "recipes", "cluster", "tests"),
}

# Third-party engines, and where they may be imported. Everything else is free.
ENGINE_HOMES = {
    "ray": ("rlprm/actors/", "rlprm/run/"),
    "deepspeed": ("rlprm/engine/", "rlprm/sources/", "rlprm/evaluation/"),
    "vllm": ("rlprm/engine/", "rlprm/sources/", "rlprm/evaluation/"),
    "transformers": ("rlprm/engine/", "rlprm/sources/", "rlprm/evaluation/", "rlprm/data/"),
    "hydra": ("rlprm/cli/", "rlprm/cli.py", "rlprm/config.py", "rlprm/config/", "rlprm/run/build.py"),
    "omegaconf": ("rlprm/cli/", "rlprm/cli.py", "rlprm/config.py", "rlprm/config/", "rlprm/run/build.py"),
}
NOUNS = ("rlprm.records", "rlprm.errors", "rlprm.roles")
# The layers of rlprm: what a folder may import from the package. A folder that is not listed may import anything
# below the entry points.
LAYERS = {
    "rlprm/core/": ("rlprm.core", *NOUNS),
    "rlprm/records.py": (),
    "rlprm/errors.py": (),
    "rlprm/roles.py": ("rlprm.records", "rlprm.errors"),
    "rlprm/batch.py": NOUNS,
    "rlprm/driver": ("rlprm.batch", *NOUNS),
    "rlprm/engine/": ("rlprm.engine", "rlprm.core", "rlprm.batch", *NOUNS),
    "rlprm/verify/": ("rlprm.verify", "rlprm.data.tasks", *NOUNS),
    "rlprm/data/": ("rlprm.data", "rlprm.batch", "rlprm.paths", *NOUNS),
    "rlprm/report/": ("rlprm.report", "rlprm.run.progress", *NOUNS),
}
# Nobody but the entry points and `run/` knows how things are put together.
ENTRY_POINTS = ("rlprm.cli", "rlprm.driver", "rlprm.run.build")
ENTRY_POINT_HOMES = ("rlprm/cli", "rlprm/run/", "rlprm/__main__.py")
# Pure modules: these third-party packages and the standard library, nothing else.
PURE = ("rlprm/core/", "rlprm/records.py", "rlprm/errors.py", "rlprm/roles.py", "rlprm/batch.py", "rlprm/driver")
PURE_PACKAGES = {"torch", "jaxtyping"}

BORDERS = ("rlprm/verify/", "rlprm/actors/", "rlprm/cli/check.py", "rlprm/contract/sources.py")
BANNED_WORDS = {"bsz", "uid", "coef", "episode", "episodes", "experience", "experiences"}
BANNED_NAMES = {"eos_mask", "action_mask", "gt_score"}


def imports(root: Path) -> list[str]:
    """Import direction: engines only in their homes, each layer only what lies below it, pure modules only torch."""
    found = []
    for path, tree in modules(root / "rlprm"):
        where = relative(root, path)
        for line, module in imported(tree):
            package = module.split(".")[0]
            place = f"{where}:{line}: imports {module}"
            if package in ENGINE_HOMES and not where.startswith(ENGINE_HOMES[package]):
                found.append(f"{place}; only {', '.join(ENGINE_HOMES[package])} may")
            if where.startswith(PURE) and package not in PURE_PACKAGES | {"rlprm"} | sys.stdlib_module_names:
                found.append(
                    f"{place}; this module knows only the standard library, {', '.join(sorted(PURE_PACKAGES))}"
                )
            for layer, below in LAYERS.items():
                if package == "rlprm" and where.startswith(layer) and not within(module, below):
                    found.append(f"{place}; {layer} may import only {', '.join(below) or 'nothing of rlprm'}")
            if within(module, ENTRY_POINTS) and not where.startswith(ENTRY_POINT_HOMES):
                found.append(f"{place}; only the entry points and run/ put things together")
    return found


def file_sizes(root: Path) -> list[str]:
    """Every Python file has fewer than 400 lines, a driver fewer than 150."""
    found = []
    for path in python_files(root):
        where = relative(root, path)
        limit = MAX_DRIVER_LINES if where.startswith("rlprm/driver") else MAX_LINES
        count = len(path.read_text(encoding="utf-8").splitlines())
        if count >= limit:
            found.append(f"{where}: {count} lines; fewer than {limit} are allowed: split it by what its parts know")
    return found


def driver_reads_no_config(root: Path) -> list[str]:
    """No name, attribute or argument of a driver is a configuration."""
    found = []
    for path, tree in modules(root / "rlprm"):
        where = relative(root, path)
        if not where.startswith("rlprm/driver"):
            continue
        for line, name in identifiers(tree):
            if re.search(r"(^|_)(config|cfg|conf|args|flags)($|_)", name):
                found.append(
                    f"{where}:{line}: {name!r}; a driver reads no configuration: hand it a number or an object"
                )
    return found


def shifts(root: Path) -> list[str]:
    """The shift by one happens once: ``[:, 1:]`` and ``[:, :-1]`` only in core/alignment.py."""
    found = []
    for folder in ("core", "engine", "sources"):
        for path, tree in modules(root / "rlprm" / folder):
            where = relative(root, path)
            if where == "rlprm/core/alignment.py":
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.Subscript) and is_shift(node.slice):
                    found.append(
                        f"{where}:{node.lineno}: {ast.unparse(node)}; shift with a function of core/alignment.py"
                    )
    return found


def banned_names(root: Path) -> list[str]:
    """Identifiers and YAML keys outside the glossary."""
    found = []
    for path in python_files(root):
        where = relative(root, path)
        for line, name in identifiers(parse(path)):
            if name in BANNED_NAMES or set(re.findall(r"[a-z]+", name.lower())) & BANNED_WORDS:
                # st_uid, pw_uid: the operating system's own names
                if re.fullmatch(r"(st|pw|real|saved)_uid", name):
                    continue
                found.append(f"{where}:{line}: {name!r} is not in the glossary; see the names in CONTRIBUTING.md")
    for path, line, key in yaml_keys(root / "conf"):
        if key in BANNED_NAMES or set(key.lower().split("_")) & BANNED_WORDS:
            found.append(f"{relative(root, path)}:{line}: key {key!r} is not in the glossary")
    return found


def config_defaults(root: Path) -> list[str]:
    """Values live in conf/: no ``.get(key, default)`` in run/build.py and config.py, no default in a schema class."""
    found = []
    read = [root / "rlprm/run/build.py", *sorted((root / "rlprm").glob("config*.py"))]
    for path in filter(Path.exists, read):
        name = relative(root, path)
        for node in ast.walk(parse(path)):
            if not isinstance(node, ast.Call):
                continue
            function = node.func
            dictionary = isinstance(function, ast.Attribute) and function.attr in ("get", "setdefault", "pop")
            attribute = isinstance(function, ast.Name) and function.id == "getattr"
            # A dunder is Python's own, never a key: getattr(annotation, "__args__", ()).
            attribute = attribute and not re.match(r"['\"]__", ast.unparse(node.args[1]))
            if (dictionary and len(node.args) + len(node.keywords) >= 2) or (attribute and len(node.args) == 3):
                found.append(
                    f"{name}:{node.lineno}: {ast.unparse(node)}; a missing key is an error, put the value in conf/"
                )
    for path, _ in modules(root / "rlprm"):
        where = relative(root, path)
        for schema in schema_classes(path):
            for node in schema.body:
                if isinstance(node, ast.AnnAssign) and node.value is not None and not is_bare_field(node.value):
                    found.append(
                        f"{where}:{node.lineno}: {schema.name}.{ast.unparse(node)}; the default belongs in conf/"
                    )
                for call in ast.walk(node) if isinstance(node, ast.AnnAssign) else ():
                    if isinstance(call, ast.Call) and field_default(call):
                        found.append(f"{where}:{node.lineno}: {ast.unparse(call)}; the default belongs in conf/")
    return found


def unsafe_calls(root: Path) -> list[str]:
    """Nothing a file or a model says is executed: no pickle, no torch.load of objects, no remote code, no eval."""
    found = []
    for path, tree in modules(root / "rlprm"):
        where = relative(root, path)
        for node in ast.walk(tree):
            problem = unsafe(node)
            if problem:
                found.append(f"{where}:{node.lineno}: {problem}")  # type: ignore[attr-defined]
    return found


def broad_excepts(root: Path) -> list[str]:
    """``except Exception`` stands at the two process borders only (verifier pool, actor call), and where pieces of
    somebody else's are tried out."""
    found = []
    for path, tree in modules(root / "rlprm"):
        where = relative(root, path)
        for node in ast.walk(tree):
            if not isinstance(node, ast.ExceptHandler) or where.startswith(BORDERS):
                continue
            names = (
                {"BaseException"}
                if node.type is None
                else {part.id for part in ast.walk(node.type) if isinstance(part, ast.Name)}
            )
            # A handler that raises again swallows nothing.
            if names & {"Exception", "BaseException"} and not any(
                isinstance(part, ast.Raise) for part in ast.walk(node)
            ):
                found.append(f"{where}:{node.lineno}: catches {', '.join(sorted(names))}; name what can go wrong")
    return found


def unlisted_metrics(root: Path, check_name: Callable[[str], object]) -> list[str]:
    """Every metric name written in the tree passes ``check_name`` (the table in core/metrics.py)."""
    found = []
    for path, tree in modules(root / "rlprm"):
        where = relative(root, path)
        if where == "rlprm/core/metrics.py":
            continue
        for line, candidates in metric_literals(tree):
            if not any(accepts(check_name, name) for name in candidates):
                found.append(
                    f"{where}:{line}: metric {candidates[0]!r} is not in the table of rlprm/core/metrics.py; add a row"
                )
    return found


def unread_keys(root: Path) -> list[str]:
    """Every key in conf/ and in the options of cluster/ is read: as an attribute somewhere in rlprm, or as an argument of
    what ``_target_`` names."""
    known: set[str] = set()
    for path, tree in modules(root / "rlprm"):
        schema = relative(root, path).startswith("rlprm/config")
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                known.add(node.attr)
            elif isinstance(node, ast.arg) and not schema:
                known.add(node.arg)
    return [
        f"{relative(root, path)}:{line}: nobody reads {key!r}; remove the key or use it"
        for path, line, key in [*yaml_keys(root / "conf"), *yaml_keys(root / "cluster", "*.yaml")]
        if key not in known
    ]


def readme_driver(root: Path) -> list[str] | None:
    """The driver shown in README.md is the driver. None: the README does not show it yet.

    The listing is the fenced block after ``<!-- rlprm/driver.py -->``; its lines stand together in that file.
    """
    readme = root / "README.md"
    if not readme.exists():
        return None
    match = re.search(r"<!-- rlprm/driver\.py -->\s*```python\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    if match is None:
        return None
    shown = dedented(match[1])
    source = (root / "rlprm/driver.py").read_text(encoding="utf-8").splitlines()
    for start in range(len(source) - len(shown) + 1):
        if dedented("\n".join(source[start : start + len(shown)])) == shown:
            return []
    return ["README.md: the listing under <!-- rlprm/driver.py --> is not a part of rlprm/driver.py; copy it again"]


def layout(root: Path) -> list[str]:
    """The top level holds what the design lists, and dot files."""
    inside = subprocess.run(
        ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=False,
    )
    names = inside.stdout.splitlines() if inside.returncode == 0 else [path.name for path in root.iterdir()]
    top = {name.split("/")[0] for name in names}
    return [f"{name}: not in the agreed layout" for name in sorted(top - TOP_LEVEL) if not name.startswith(".")]
