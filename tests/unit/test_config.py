"""A misspelt, missing, mistyped or contradictory key fails before any model is loaded, by its name."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from rlprm.config import SftConfig, TrainConfig, validated
from rlprm.errors import ConfigError
from rlprm.parts import locate
from tests.contract import options as listing

# Sections whose keys are names that the user makes up, not keys that the schema knows.
# sections whose keys are names, or arguments of somebody else's function
FREE = (
    "streams", "data.train", "data.evaluation", "data.template.arguments", "alarms.rules", "verifier.function.options",
)  # fmt: skip
NUMBER_OR_WORD = ("bound", "scale")
HYDRA = ("_target_", "_partial_")


def paths(node: Any, path: tuple[str, ...] = ()):
    """Every key of a nested dictionary, sections before what they hold."""
    for key, value in node.items() if isinstance(node, dict) else ():
        yield (*path, key)
        yield from paths(value, (*path, key))


def parent_of(values: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    node = values
    for key in path[:-1]:
        node = node[key]
    return node


def misspelt(key: str) -> str:
    """One letter too many."""
    return key[:-1] + key[-1] * 2 if key[-1].isalpha() else f"{key}x"


def message(schema: type, values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        validated(schema, values)
    return str(caught.value)


def shipped() -> dict[tuple[type, tuple[str, ...]], dict[str, Any]]:
    """Every key of every shipped option, method and recipe, with a configuration that has it."""
    configurations = [
        (listing.SCHEMAS[listing.place(group)[0]], listing.values_of(group, option))
        for group, option in listing.options()
        if listing.place(group)[0] in ("train", "sft")
    ]
    configurations += [(TrainConfig, listing.values("train", [f"recipe={recipe}"])) for recipe in listing.recipes()]
    found: dict[tuple[type, tuple[str, ...]], dict[str, Any]] = {}
    for schema, values in configurations:
        for path in paths(values):
            section, key = ".".join(path[:-1]), path[-1]
            if section not in FREE and key not in HYDRA:
                found.setdefault((schema, path), values)
    return found


@pytest.fixture(scope="module")
def keys():
    return shipped()


@pytest.fixture(scope="module")
def train() -> dict[str, Any]:
    return dict(listing.values("train", ["model.path=somewhere"]))


def changed(values: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    copied = copy.deepcopy(values)
    parts = tuple(path.split("."))
    assert parts[-1] in parent_of(copied, parts), f"{path} is no key; the test would change nothing"
    parent_of(copied, parts)[parts[-1]] = value
    return copied


def test_every_key_misspelt_is_named_with_the_right_one(keys):
    assert len(keys) > 250
    for (schema, path), values in keys.items():
        wrong = misspelt(path[-1])
        copied = copy.deepcopy(values)
        section = parent_of(copied, path)
        section[wrong] = section.pop(path[-1])
        said = message(schema, copied)
        line = next((line for line in said.splitlines() if f"{wrong}:" in line or f"{wrong!r}" in line), None)
        assert line is not None, f"{'.'.join(path)} as {wrong}: the message does not name it: {said}"
        assert f"nearest is {path[-1]!r}" in line, f"{'.'.join(path)} as {wrong}: {line}"


def test_every_key_left_out_is_named(keys):
    for (schema, path), values in keys.items():
        copied = copy.deepcopy(values)
        section = parent_of(copied, path)
        partial_default = "_target_" in section and path[-1] in optional_of(section)
        del section[path[-1]]
        if not partial_default:
            assert path[-1] in message(schema, copied)


def optional_of(section: dict[str, Any]) -> set[str]:
    """Arguments that the callable itself gives a value (its signature, not the schema, has that default)."""
    import inspect

    signature = inspect.signature(locate(section["_target_"]))
    return {name for name, one in signature.parameters.items() if one.default is not one.empty}


def test_every_number_and_switch_as_text_is_refused_by_name(keys):
    tried = 0
    for (schema, path), values in keys.items():
        value = parent_of(values, path)[path[-1]]
        if isinstance(value, (bool, int, float)) and path[-1] != "bound":
            tried += 1
            copied = changed(values, ".".join(path), "wrong")
            assert path[-1] in message(schema, copied), path
    assert tried > 100


def test_every_text_as_a_number_is_refused_by_name(keys):
    tried = 0
    for (schema, path), values in keys.items():
        value = parent_of(values, path)[path[-1]]
        if isinstance(value, str) and path[-1] not in NUMBER_OR_WORD:
            tried += 1
            assert path[-1] in message(schema, changed(values, ".".join(path), 7)), path
    assert tried > 50


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 0),
        ("steps", 2.5),
        ("seed", -1),
        ("prompts_per_step", 0),
        ("responses_per_prompt", 0),
        ("temperature", 0.0),
        ("max_response_tokens", 0),
        ("resume", "sometimes"),
        ("name", ""),
        ("streams", {}),
        ("data.train", {}),
        ("data.train.chain.weight", 0.0),
        ("data.max_prompt_tokens", 0),
        ("model.dtype", "float16"),
        ("model.path", ""),
        ("verifier.workers", 0),
        ("verifier.timeout_s", 0.0),
        ("verifier.max_error_fraction", 1.5),
        ("keep.max_rounds", 0),
        ("policy.lr", 0.0),
        ("policy.betas", [0.9]),
        ("policy.betas", [0.9, 1.0]),
        ("policy.zero_stage", 4),
        ("policy.warmup", -1),
        ("policy.schedule", "step"),
        ("policy.layout", "dense"),
        ("policy_loss.kl_weight", -0.1),
        ("policy_loss.kl_kind", "k1"),
        ("policy_loss.aggregation", "mean"),
        ("policy_loss.horizon", 0),
        ("placement.device", "tpu"),
        ("placement.policy_ranks", 0),
        ("placement.stage_timeout_s", 0.0),
        ("evaluation.temperature", 0.0),
        ("evaluation.limit", 0),
        ("checkpoint.keep_last", 0),
        ("tracker.rollout_groups", -1),
        ("whiten", "half"),
        ("streams.process.source.kind.reference", "initail"),
        ("streams.process.source.kind.granularity", "line"),
        ("streams.process.source.kind.update", "sometimes"),
        ("streams.process.normalizer.unit", "tokens"),
        ("streams.process.estimator.gamma", 1.5),
        ("streams.process.normalizer.eps", -1.0),
        ("policy_loss.surrogate.clip_low", -0.2),
        ("policy_loss.surrogate.dual_clip", 0.5),
    ],
)
def test_value_out_of_range_is_refused_by_name(train, key, value):
    said = message(TrainConfig, changed(train, key, value))
    assert key.split(".")[-1] in said
    assert len(said) > 20


def test_values_at_the_edge_are_accepted(train):
    for key, value in (
        ("seed", 0),
        ("verifier.max_error_fraction", 0.0),
        ("evaluation.every", 0),
        ("policy.warmup", 0),
    ):
        validated(TrainConfig, changed(train, key, value))


def test_several_mistakes_are_all_named(train):
    said = message(TrainConfig, changed(changed(train, "steps", 0), "policy.lr", "fast"))
    assert "steps: found 0" in said
    assert "policy.lr: found 'fast'" in said


def test_config_is_frozen(train):
    config = validated(TrainConfig, train)
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 3


def test_no_section_has_a_default():
    pending, seen = [TrainConfig, SftConfig, *listing.SCHEMAS.values()], set()
    while pending:
        schema = pending.pop()
        if schema in seen:
            continue
        seen.add(schema)
        for name, field in schema.model_fields.items():
            assert field.is_required(), f"{schema.__name__}.{name} has a default; its value belongs in conf/"
            pending += [each for each in _sections(field.annotation)]
    assert len(seen) > 15


def _sections(annotation: Any):
    from rlprm.config import Section

    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _sections(inner)


def test_target_is_imported_and_explained(train):
    with pytest.raises(
        ConfigError, match=r"'rlprm\.core\.steps\.nothing' cannot be imported .*expected package\.module"
    ):
        locate("rlprm.core.steps.nothing")
    with pytest.raises(ConfigError, match="is a float; expected a function or class"):
        locate("rlprm.core.groups.TIE")
    assert "splitter: has no _target_ (keys: target)" in message(
        TrainConfig, changed(train, "splitter", {"target": "x"})
    )
    said = message(TrainConfig, changed(train, "splitter._partial_", False))
    assert "rlprm.core.steps.separator needs pieces" in said


def test_misspelt_word_of_hydra_is_refused(train):
    splitter = {"_target_": "rlprm.core.steps.whole", "_partail_": True}
    assert "has the key '_partail_'" in message(TrainConfig, changed(train, "splitter", splitter))


def test_nested_part_is_checked_too(train):
    key = "data.train.chain.reader.source.modulus"
    assert "modulus is '7'" in message(TrainConfig, changed(train, key, "7"))
