"""Reading Python and YAML for the guards: syntax trees, identifiers, metric names, keys."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path


def python_files(root: Path) -> list[Path]:
    return sorted(path for folder in ("rlprm", "tests", "recipes", "cluster") for path in (root / folder).rglob("*.py"))


def modules(folder: Path) -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(folder.rglob("*.py")):
        yield path, parse(path)


@cache
def parsed(path: Path, changed: int) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def parse(path: Path) -> ast.Module:
    return parsed(path, path.stat().st_mtime_ns)


def relative(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module in ("rlprm", "rlprm.run", "rlprm.data"):
            # `from rlprm import driver` imports rlprm.driver
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or "a relative path"


def identifiers(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.value.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name


def is_shift(index: ast.expr) -> bool:
    if not isinstance(index, ast.Tuple) or len(index.elts) < 2:
        return False
    first = index.elts[0]
    everything = isinstance(first, ast.Slice) and first.lower is None and first.upper is None
    dots = isinstance(first, ast.Constant) and first.value is Ellipsis
    return (everything or dots) and any(drops_one(part) for part in index.elts[1:])


def drops_one(part: ast.expr) -> bool:
    return isinstance(part, ast.Slice) and ast.unparse(part) in ("1:", ":-1", "1::1", ":-1:1")


def schema_classes(path: Path) -> list[ast.ClassDef]:
    classes = [node for node in ast.walk(parse(path)) if isinstance(node, ast.ClassDef)] if path.exists() else []
    models, before = {"BaseModel", "Section"}, 0
    while len(models) != before:
        before = len(models)
        models |= {node.name for node in classes if {ast.unparse(base).split(".")[-1] for base in node.bases} & models}
    return [node for node in classes if node.name in models]


def is_bare_field(value: ast.expr) -> bool:
    return isinstance(value, ast.Call) and ast.unparse(value.func).endswith("Field") and not field_default(value)


def field_default(call: ast.Call) -> bool:
    if ast.unparse(call.func).split(".")[-1] != "Field":
        return False
    positional = bool(call.args) and not (isinstance(call.args[0], ast.Constant) and call.args[0].value is Ellipsis)
    return positional or any(keyword.arg in ("default", "default_factory") for keyword in call.keywords)


def unsafe(node: ast.AST) -> str | None:
    if isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and ast.unparse(node.value) != "False":
        return "trust_remote_code runs code that a model folder brings; only False may be written"
    if not isinstance(node, ast.Call):
        return None
    name = ast.unparse(node.func)
    if name in ("eval", "exec"):
        return f"{name}() runs text; parse it instead"
    if re.fullmatch(r"(pickle|cloudpickle|dill|_pickle|cPickle)\.(loads?|Unpickler)", name):
        return f"{name} runs what the file says; use safetensors or JSON"
    if name == "torch.load" and not any(
        k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords
    ):
        return "torch.load without weights_only=True runs what the file says"
    return None


_METRIC = re.compile(
    r"(actor|critic|reward|adv|prm|keep|select|verifier|staleness|training|timing_s|perf|weights|alarm"
    r"|response_length|response_text|prompt_length|process_steps|val-core|val-aux)(/[\w@.\-]+)+|(sft|dpo)/\w+"
)


def metric_literals(tree: ast.Module) -> Iterator[tuple[int, list[str]]]:
    inside_fstring = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in ast.walk(node)
        if part is not node
    }
    for node in ast.walk(tree):
        if id(node) in inside_fstring:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and _METRIC.fullmatch(node.value):
            yield node.lineno, [node.value]
        elif isinstance(node, ast.JoinedStr):
            # What is filled in is a stream, a source, a stage or a number of samples: some of each must be allowed.
            names = [
                "".join(str(p.value) if isinstance(p, ast.Constant) else fill for p in node.values) for fill in FILLS
            ]
            if _METRIC.fullmatch(names[0]) and isinstance(node.values[0], ast.Constant):
                yield node.lineno, names


FILLS = ("outcome", "8", "step", "generate", "mean", "gsm8k")


def accepts(check_name: Callable[[str], object], name: str) -> bool:
    try:
        check_name(name)
    except ValueError:
        return False
    return True


# What stands below these is a name that the user chooses: a stream, a data source, an evaluation set, an alarm.
NAMED = ("streams", "train", "evaluation", "rules")


def yaml_keys(folder: Path, pattern: str = "**/*.yaml") -> Iterator[tuple[Path, int, str]]:
    """Keys as written, by line, without Hydra's own (``defaults``, ``_target_``) and names that users choose."""
    for path in sorted(folder.glob(pattern)):
        inside: list[tuple[int, str]] = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            match = re.match(r"( *)(?:- )?([A-Za-z_][\w-]*):(?: |$)", line)
            if match is None:
                continue
            indent, key = len(match[1]), match[2]
            inside = [parent for parent in inside if parent[0] < indent]
            parents = [parent[1] for parent in inside]
            inside.append((indent, key))
            free = (bool(parents) and parents[-1] in NAMED) or "defaults" in parents or "hydra" in parents
            if not free and not key.startswith("_") and key not in ("defaults", "hydra"):
                yield path, number, key


def dedented(text: str) -> list[str]:
    lines = text.rstrip().splitlines()
    margin = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    return [line[margin:].rstrip() for line in lines]
