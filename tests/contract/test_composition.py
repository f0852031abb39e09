"""Every option of every group, every method and every recipe composes, validates and instantiates."""

from __future__ import annotations

import json
import re
from itertools import combinations

import pytest

from rlprm.cli.compose import composed
from rlprm.config import SftConfig, TrainConfig, validated
from rlprm.parts import made
from rlprm.paths import cluster_dir, conf_dir, recipes_dir
from tests.contract import options as listing


def named(pair: tuple[str, str]) -> str:
    return "/".join(pair)


@pytest.mark.parametrize("pair", listing.options(), ids=named)
def test_option_composes_and_validates(pair):
    validated(listing.SCHEMAS[listing.place(pair[0])[0]], listing.values_of(*pair))


@pytest.mark.parametrize("pair", listing.options(), ids=named)
def test_option_instantiates(pair):
    for _, part in listing.parts(listing.content_of(*pair)):
        # Size is how many texts are written, not what they are.
        built = made({**part, "size": 3} if "size" in part else part)
        assert built is not None
        assert callable(built) or not hasattr(built, "__len__") or len(built) > 0


@pytest.mark.parametrize(
    "recipe", [each for each in listing.recipes() if not (recipes_dir() / each / "prepare.yaml").exists()]
)
def test_recipe_that_brings_everything_composes_validates_and_instantiates(recipe):
    values = composed("train", [f"recipe={recipe}"]).values
    config = validated(TrainConfig, values)
    assert config.model.path.startswith(str(recipes_dir()))
    for _, part in listing.parts(values):
        made(part)


@pytest.mark.parametrize(
    "recipe", [each for each in listing.recipes() if (recipes_dir() / each / "warm_up.yaml").exists()]
)
def test_warm_up_of_a_recipe_composes_and_validates(recipe):
    config = validated(SftConfig, listing.values("sft", [f"recipe={recipe}"]))
    made(config.initial)


@pytest.mark.parametrize("entry", listing.entries())
def test_entry_has_a_schema_and_validates_with_its_own_defaults(entry):
    validated(listing.SCHEMAS[entry], listing.values(entry, listing.REQUIRED[entry]))


@pytest.mark.parametrize("entry", [entry for entry in listing.entries() if listing.REQUIRED[entry]])
def test_value_that_nobody_gave_is_named(entry):
    for left_out in listing.REQUIRED[entry]:
        key = re.escape(left_out.split("=")[0])
        with pytest.raises(ValueError, match=rf"no value for {key}; give it on the command line \({key}=\.\.\.\)"):
            listing.values(entry, [given for given in listing.REQUIRED[entry] if given != left_out])


@pytest.mark.parametrize("group", sorted({group for group, _ in listing.options()}))
def test_no_two_options_name_the_same_behaviour(group):
    contents = {option: listing.content_of(group, option) for option in listing.of_group(group)}
    for first, second in combinations(contents, 2):
        assert contents[first] != contents[second], f"conf/{group}: {first} and {second} say the same"


def test_no_two_recipes_name_the_same_run():
    contents = {}
    for recipe in listing.recipes():
        values = dict(composed("train", [f"recipe={recipe}"]).values)
        values.pop("name")
        contents[recipe] = json.dumps(values, sort_keys=True)
    assert len(set(contents.values())) == len(contents)


FILES = sorted([*conf_dir().rglob("*.yaml"), *recipes_dir().rglob("*.yaml"), *cluster_dir().glob("*.yaml")])
UNCOMMENTED = ("defaults", "_target_", "_partial_")  # Hydra's own words


def without_comment(text: str) -> list[str]:
    """Keys that have no comment line right above them, at their own indentation."""
    found, above = [], ""
    for line in text.splitlines():
        key = re.match(r"^( *)([A-Za-z_][\w\-]*):(\s|$)", line)
        if key and key[2] not in UNCOMMENTED and not re.match(rf"^{key[1]}# \S", above):
            found.append(line.strip())
        above = line
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_every_key_has_a_comment_line_above_it(file):
    assert not without_comment(file.read_text(encoding="utf-8"))


def test_key_without_comment_is_found():
    assert without_comment("# of a\na: 1\nb: 2\nc:\n# of d, at the wrong depth\n  d: 1\n") == ["b: 2", "c:", "d: 1"]


@pytest.mark.parametrize("pair", listing.options(), ids=named)
def test_option_begins_with_what_it_is(pair):
    first = (conf_dir() / pair[0] / f"{pair[1]}.yaml").read_text(encoding="utf-8").removeprefix("# @package _global_\n")
    assert re.match(r"# \S.*\.\)?\n", first), f"first line is {first.splitlines()[0]!r}; expected a sentence"


def test_readme_names_every_group_and_option_and_nothing_else():
    rows = {}
    for line in (conf_dir() / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `"):
            rows[cells[0].strip("`")] = re.findall(r"`([\w\-]+)`", cells[-1])
    expected = {group: listing.of_group(group) for group in sorted({group for group, _ in listing.options()})}
    assert {group: sorted(found) for group, found in rows.items()} == expected
