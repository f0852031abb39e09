from __future__ import annotations

import pytest

from rlprm.cli.cells import cells_of, explicit_cells, split_own
from rlprm.errors import ConfigError


def names(words, **explicit):
    return [cell.name for cell in cells_of(words, explicit, stream="process").cells]


def test_a_grid_is_the_product_of_what_is_swept():
    found = cells_of(["steps=5", "normalizer=raw,batch_mean", "streams.process.weight=0.5,1"], {}, stream="process")
    assert found.shared == ("steps=5",)
    assert [(cell.name, cell.overrides) for cell in found.cells] == [
        ("normalizer=raw,weight=0.5", ("normalizer@streams.process.normalizer=raw", "streams.process.weight=0.5")),
        ("normalizer=raw,weight=1", ("normalizer@streams.process.normalizer=raw", "streams.process.weight=1")),
        ("normalizer=batch_mean,weight=0.5", ("normalizer@streams.process.normalizer=batch_mean", "streams.process.weight=0.5")),
        ("normalizer=batch_mean,weight=1", ("normalizer@streams.process.normalizer=batch_mean", "streams.process.weight=1")),
    ]  # fmt: skip
    assert found.overrides(found.cells[0]) == ["steps=5", *found.cells[0].overrides]


def test_every_sweep_of_hydras_grammar():
    assert names(["splitter=newline,whole"]) == ["newline", "whole"]
    assert names(["splitter=choice(newline,whole)"]) == ["newline", "whole"]
    assert names(["policy.mini_batches=range(1,4)"]) == ["1", "2", "3"]
    assert names(["policy.lr=range(0.1,0.3,0.1)"]) == ["0.1", "0.2"]
    assert names(["splitter=glob([n*,w*])"]) == ["newline", "numbered", "whole"]
    assert "raw" not in names(["normalizer=glob(*,exclude=[raw,p*])"])
    assert "chain_arithmetic_cpu" in names(["recipe=glob(*)"])
    assert names(["data.max_prompt_tokens=8", "x.y='a,b',\"c d\""]) == ["a-b", "c-d"]


def test_options_that_a_recipe_or_a_folder_brings_are_globbed_too(tmp_path):
    (tmp_path / "splitter").mkdir()
    (tmp_path / "splitter" / "mine.yaml").write_text("# mine\n")
    found = cells_of(["splitter=glob(mi*)"], {}, stream="process", config_dir=tmp_path)
    assert [cell.overrides for cell in found.cells] == [("splitter=mine",)]


def test_pieces_belong_to_the_named_stream_unless_they_say_where():
    found = cells_of(["gate=trust", "normalizer@streams.outcome.normalizer=raw,batch_mean"], {}, stream="verdict")
    assert found.shared == ("gate@streams.verdict.gate=trust",)
    assert found.cells[0].overrides == ("normalizer@streams.outcome.normalizer=raw",)
    added = cells_of(["+source=implicit,exact"], {"c": ["estimator=to_go"]}, stream="process").cells
    assert added[0].overrides == ("+source@streams.process.source=implicit",)
    assert added[-1].overrides == ("estimator@streams.process.estimator=to_go",)


def test_swept_keys_with_one_last_word_keep_their_whole_name():
    assert names(["a.weight=1,2", "b.weight=3"]) == ["1", "2"]
    assert names(["a.weight=1,2", "b.weight=3,4"])[0] == "a.weight=1,b.weight=3"


def test_deletions_and_interpolations_pass_through():
    found = cells_of(["~critic", "x=${y}", "k=1,2"], {}, stream="process")
    assert found.shared == ("~critic", "x=${y}")


def test_explicit_cells_stand_beside_a_grid(tmp_path):
    file = tmp_path / "cells.yaml"
    file.write_text("oracle: [method=oracle]\n")
    explicit = explicit_cells(["rloo: method=outcome_rloo data.x='a b'"], file)
    assert explicit == {"oracle": ["method=oracle"], "rloo": ["method=outcome_rloo", "data.x='a b'"]}
    assert names(["normalizer=raw,batch_mean"], **explicit) == ["raw", "batch_mean", "oracle", "rloo"]
    assert names([], **explicit) == ["oracle", "rloo"]


@pytest.mark.parametrize(
    ("words", "explicit", "said"),
    [
        (["steps=3"], {}, "nothing to compare"),
        (["policy.lr=interval(0,1)"], {}, "an interval has no values to run"),
        (["policy.lr=glob(*)"], {}, "glob lists the options of a group, and 'policy.lr' is none"),
        (["splitter=glob(zz*)"], {}, "there is no value"),
        (["seed=1,2"], {}, "seed=1,2: leave it out; give the seeds of all cells with seeds="),
        (["k=1,2", "resume=never"], {}, "always goes on where it stopped"),
        ([], {"a": ["seed=1"]}, "seed=1: leave it out"),
        ([], {"a": ["k=1,2"]}, "cell 'a': 'k=1,2' gives several values"),
        ([], {"a/b": ["k=1"]}, "cannot be a folder's name"),
        (["k=a b,a/b"], {}, "several cells 'a-b'"),
        (["k=1,2"], {"1": ["k=3"]}, "several cells '1'"),
        (["k=[1"], {}, "cannot be read"),
    ],
)
def test_what_is_no_comparison_is_refused(words, explicit, said):
    with pytest.raises(ConfigError, match=said.replace("(", r"\(").replace("[", r"\[").replace("+", r"\+")):
        cells_of(words, explicit, stream="process")


@pytest.mark.parametrize(
    ("given", "content", "said"),
    [
        (["method=oracle"], None, "expected 'NAME: key=value"),
        (["a: x=1", "a: x=2"], None, "several cells 'a'"),
        (["a: x='1"], None, "cannot be read"),
        ([], "- a\n", "holds a list"),
        ([], "a: method=oracle\n", "'a' is 'method=oracle'"),
        ([], "a: [1]\n", "expected YAML of the form"),
        ([], "a: [\n", "cannot be read"),
    ],
)
def test_cells_that_are_not_of_their_form(tmp_path, given, content, said):
    file = None
    if content is not None:
        file = tmp_path / "cells.yaml"
        file.write_text(content)
    with pytest.raises(ConfigError, match=said):
        explicit_cells(given, file)


def test_a_baseline_that_does_not_exist_is_named_with_the_nearest():
    found = cells_of(["splitter=newline,whole"], {}, stream="process")
    assert found.named(None).name == "newline"
    assert found.named("whole").name == "whole"
    with pytest.raises(ConfigError, match=r"no cell 'wole'.*nearest is 'whole'"):
        found.named("wole")


def test_the_ablations_own_keys_are_taken_out():
    own = ["seeds", "level", "collapse"]
    found = split_own(["seeds=[3,7]", "collapse.entropy=0", "steps=2"], own)
    assert found == (["seeds=[3,7]", "collapse.entropy=0"], ["steps=2"])
    assert split_own(["seeds=3,7"], own) == (["seeds=[3,7]"], [])
