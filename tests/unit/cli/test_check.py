"""`rlprm check` on a package of the user's own: what keeps its promises, what does not, and what cannot be tried."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlprm.cli.main import main

PIECES = """
import torch

from rlprm.records import Stream
from rlprm.sources.base import ProcessSource, Scores


def by_rms(rewards, present, shard, reduce, *, eps: float):
    entries = torch.where(present, rewards, 0.0).double()
    total, count = reduce.sum(torch.stack([(entries**2).sum(), present.sum().double()]))
    return (entries / ((total / count.clamp_min(1)).sqrt() + eps)).to(rewards.dtype)


def own_rms(rewards, present, shard, reduce):
    entries = torch.where(present, rewards, 0.0).double()
    return (entries / ((entries**2).sum() + 1e-6).sqrt()).to(rewards.dtype)


def half(rewards, present, shard):
    return torch.where(present & shard.response_mask, rewards / 2, 0.0)


def turned(part, around):
    return -part


class Brevity(ProcessSource):
    def __init__(self, context, *, price: float):
        self.name, self.price = context.name, price

    def score(self, given):
        rows = given.padded
        return Scores.of(Stream(rewards=-self.price * rows.response_mask, present=rows.response_mask))


class Everywhere(Brevity):
    def score(self, given):
        rows = given.padded
        return Scores.of(Stream(rewards=self.price * rows.attention_mask, present=rows.attention_mask))


class Asks(Brevity):
    engine = "rollout"


def says_gold(gold, response, prompt):
    return (1.0, "found") if gold in response.split() else (0.0, "not found")


def generous(gold, response, prompt):
    return 1.0, "always"
"""
SOURCE = "kind:\n  _target_: own_pieces_of_check.{}\n  _partial_: true\n  price: 0.1\nmodel: null\nlearner: null\n"
PART = "_target_: own_pieces_of_check.{}\n_partial_: true\n"
VERIFIER = (
    "function:\n  _target_: own_pieces_of_check.{}\n  _partial_: true\n"
    "workers: 1\ntimeout_s: 5.0\nmemory_mb: 512\nmax_error_fraction: 0.0\n"
)
GOOD = {
    "normalizer/by_rms": PART.format("by_rms") + "eps: 1.0e-6\n",
    "estimator/half": PART.format("half"),
    "source/brevity": SOURCE.format("Brevity"),
    "verifier/says_gold": VERIFIER.format("says_gold"),
}


@pytest.fixture
def own(tmp_path: Path, monkeypatch):
    (tmp_path / "own_pieces_of_check.py").write_text(PIECES)
    monkeypatch.syspath_prepend(str(tmp_path))

    def written(options: dict[str, str]) -> str:
        for name, text in options.items():
            file = tmp_path / "mine" / f"{name}.yaml"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return str(tmp_path / "mine")

    return written


def test_pieces_that_keep_their_promises(own, capsys):
    assert main(["check", "--config-dir", own(GOOD)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [*(f"ok         {name}" for name in sorted(GOOD)), "4 of 4 keep the promises of their groups"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("normalizer/own", PART.format("own_rms"), "failed     normalizer/own: "),
        ("gate/turned", PART.format("turned"), "a gate turned credit around"),
        ("source/everywhere", SOURCE.format("Everywhere"), "a reward off the response"),
        ("verifier/generous", VERIFIER.format("generous"), r"an empty answer \('\s*'\) earned 1.0"),
        ("normalizer/typo", PART.format("by_rms") + "epss: 1.0\n", "takes no argument 'epss' .*nearest is 'eps'"),
        ("estimator/none_such", PART.format("nothing"), "cannot be imported"),
    ],
)
def test_a_broken_promise_is_named(name, text, message, own, capsys):
    import re

    assert main(["check", "--config-dir", own({name: text})]) == 1
    assert re.search(message, capsys.readouterr().out)


def test_what_needs_an_engine_is_not_tried_and_says_so(own, capsys):
    assert main(["check", "--config-dir", own({"source/asks": SOURCE.format("Asks")})]) == 0
    assert "not tried  source/asks: it asks for an engine (rollout); run it for a step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "is no folder"), ({"normaliser/a": PART.format("half")}, "is no group; expected one of")],
)
def test_a_folder_that_is_none_is_refused(options, message, own, capsys):
    assert main(["check", "--config-dir", own(options)]) == 1
    assert message in capsys.readouterr().err


def test_the_example_of_the_readme_keeps_its_promises(tmp_path, monkeypatch, capsys):
    """The section `Adding your own`, word for word: under 20 lines of code, and the files it names."""
    import re

    section = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8").split("## Adding your own")[1]
    code = re.search(r"```python\n(.*?)```", section, re.S)
    files = re.search(r"```yaml\n(.*?)```", section, re.S)
    assert code
    assert files
    assert len([line for line in code[1].splitlines() if line.strip()]) < 20
    (tmp_path / "my_pieces.py").write_text(code[1])
    for name, text in re.findall(r"# (mine/\S+)\n((?:[^#].*\n)+)", files[1]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["check", "--config-dir", str(tmp_path / "mine")]) == 0
    assert "4 of 4 keep the promises" in capsys.readouterr().out
