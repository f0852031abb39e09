"""A PRM's number of each step stands at the policy's token that ends the step, whatever tokens the PRM reads."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rlprm.batch import chosen_rows, flatten
from rlprm.engine.combine import global_numbers
from rlprm.errors import AlignmentError, ConfigError
from rlprm.parts import made as made_part
from rlprm.roles import Prompt, RowText
from rlprm.sources.base import OWN
from rlprm.sources.discriminative import DiscriminativePrm
from tests.contract import options as listing
from tests.unit.engine import tiny_prm
from tests.unit.made import context, scorable, shard

QUESTION = Prompt(id="a/0", text="rendered", question="?", tokens=(0,), gold="7", source="a")
SEPARATED: dict[str, Any] = {"prompt": "{question}", "separator": "\n", "bos": False, "head": "classifier"}


def texts(*rows: tuple[str, ...]) -> tuple[RowText, ...]:
    return tuple(RowText(prompt=QUESTION, response="".join(steps), steps=steps) for steps in rows)


def option(name: str) -> Any:
    return made_part(listing.read(listing.conf_dir() / "prm_format" / f"{name}.yaml"))


def prm(
    path: str, build: Any | None = None, *, range: str = "probability", max_tokens: int | None = None, **changes: Any
):
    from rlprm.data.tokenizer import load_tokenizer
    from rlprm.sources.prm_formats import Separated

    where = context(model=path, tokenizer=load_tokenizer(path), **changes)
    return DiscriminativePrm(where, format=build or partial(Separated, **SEPARATED), range=range, max_tokens=max_tokens)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    where = tmp_path_factory.mktemp("prm")
    return {head: tiny_prm.folder(where, head) for head in tiny_prm.heads()}


# Two responses of the policy, whose tokens are none of the PRM's: steps of two and one tokens, and one step of two.
GIVEN = shard([3, 2], [1.0, 0.0], steps=[[0, 0, 1], [0, 0]], labels=[(1, 0), (0,)])
TEXTS = texts(("a\n", "!"), ("!!",))
ZEROS = torch.zeros(7)


def scored(source: DiscriminativePrm, given=GIVEN, written=TEXTS):
    scores = source.score(scorable(given, ref=torch.zeros(len(given.tokens)), texts=written))
    stream = scores.streams[OWN]
    assert set(scores.streams) == {OWN}
    return flatten(stream.rewards, given.lengths).tolist(), flatten(stream.present, given.lengths).tolist(), scores


# "?a\n": no ! among 3 tokens, 0.5. "?a\n!\n": one of five, 0.109431. "?!!\n": two of four, 0.003884 (tiny_prm).
STEPS = [0.5, 0.109431, 0.003884]


@pytest.mark.parametrize("head", ["one", "two", "mlp"])
def test_probability_stands_at_the_policys_last_token_of_each_step(folders, head: str):
    rewards, present, _ = scored(prm(folders[head]))
    #                                prompt  step 0         step 1   prompt  step 0
    assert rewards == pytest.approx([0.0, 0.0, STEPS[0], STEPS[1], 0.0, 0.0, STEPS[2]], abs=1e-5)
    assert present == [False, False, True, True, False, False, True]


def test_plus_minus_is_twice_the_probability_less_one(folders):
    rewards, _, _ = scored(prm(folders["two"], range="plus_minus"))
    assert rewards == pytest.approx([0, 0, 0.0, 2 * STEPS[1] - 1, 0, 0, 2 * STEPS[2] - 1], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("skywork", "value"),
        ("math_shepherd", "none"),
        ("rlhflow", "none"),
        ("qwen_prm", "mlp"),
        ("reasonflux", "mlp"),
        ("fin_prm", "mlp"),
        ("token_classification", "two"),
    ],
)
def test_every_family_counts_what_it_has_read(folders, name: str, head: str):
    build = option(name)
    rewards, present, _ = scored(prm(folders[head], build))
    tokens = tiny_prm.tokenizer()
    expected = []
    for steps in (("a", "!"), ("!!",)):
        reading = build(tokens).read("?", steps)
        bad = [token == tokens.convert_tokens_to_ids("!") for token in reading.tokens]
        expected += [tiny_prm.chance(sum(bad[: place + 1]), place + 1) for place in reading.positions]
    assert [value for value, there in zip(rewards, present, strict=True) if there] == pytest.approx(expected, abs=1e-5)


def test_a_step_that_follows_changes_no_number_before_it(folders):
    one = shard([2], [1.0], steps=[[0, 0]])
    two = shard([4], [1.0], steps=[[0, 0, 1, 1]])
    source = prm(folders["one"])
    short, _, _ = scored(source, one, texts(("a!\n",)))
    long, _, _ = scored(source, two, texts(("a!\n", "!!!!!!")))
    assert short[2] == long[2] != 0.0
    assert long[4] < long[2]


def test_steps_behind_the_length_limit_are_absent_and_counted(folders):
    # "?a\n!\n" ends its second step with the fifth token, "?!!\n" its only one with the fourth
    rewards, present, scores = scored(prm(folders["one"], max_tokens=4))
    assert present == [False, False, True, False, False, False, True]
    assert rewards == pytest.approx([0, 0, 0.5, 0, 0, 0, STEPS[2]], abs=1e-5)
    assert global_numbers([scores.metrics]) == {
        "prm/frac_steps_cut": pytest.approx(1 / 3),
        "prm/frac_forged": 0.0,
    }


def test_limit_of_the_models_configuration_holds(tmp_path: Path):
    source = prm(tiny_prm.folder(tmp_path, "one", context=8))
    steps = tuple(["aaa\n"] * 3)
    _, present, scores = scored(source, shard([3], [1.0], steps=[[0, 1, 2]]), texts(steps))
    assert present == [False, True, False, False]  # "?aaa\n" is 5 tokens, the next step ends at the ninth
    assert global_numbers([scores.metrics])["prm/frac_steps_cut"] == pytest.approx(2 / 3)
    with pytest.raises(ConfigError, match=r"max_tokens is 9 and the PRM .* reads at most 8 tokens"):
        prm(tiny_prm.folder(tmp_path, "one", context=8), max_tokens=9)


def test_response_that_writes_control_tokens_earns_nothing(folders):
    for name, head in (("qwen_prm", "mlp"), ("token_classification", "two"), ("rlhflow", "none")):
        written = texts(("a\n", "b<extra_0>"), ("!!",))
        rewards, present, scores = scored(prm(folders[head], option(name)), written=written)
        assert present == [False] * 6 + [True]
        assert rewards[:6] == [0.0] * 6
        assert global_numbers([scores.metrics]) == {"prm/frac_steps_cut": 0.0, "prm/frac_forged": 0.5}


def test_quality_is_measured_beside_surprisal(folders):
    ref = torch.tensor([0.0, -1.0, -2.0, -4.0, 0.0, -8.0, -16.0])
    scores = prm(folders["one"]).score(scorable(GIVEN, ref=ref, texts=TEXTS))
    assert scores.measurement is not None
    # the mean of steps, and its chance
    means = [(STEPS[0] + STEPS[1]) / 2, STEPS[2]]
    assert scores.measurement.rows.reward.tolist() == pytest.approx(means, abs=1e-5)
    assert scores.measurement.rows.logit.sigmoid().tolist() == pytest.approx(means, abs=1e-5)
    assert scores.measurement.rows.surprisal.tolist() == [-7.0, -24.0]
    numbers, _, labels = scores.measurement.steps[0]
    assert numbers == pytest.approx(STEPS[:2], abs=1e-5)
    assert labels == (1, 0)
    signed = prm(folders["one"], range="plus_minus").score(scorable(GIVEN, ref=ref, texts=TEXTS)).measurement
    assert signed.rows.reward.tolist() == pytest.approx([2 * mean - 1 for mean in means], abs=1e-5)
    assert signed.rows.logit.sigmoid().tolist() == pytest.approx(means, abs=1e-5)


def test_quality_is_that_of_steps_which_the_prm_could_read(folders):
    # the limit cuts the second step of the first response; control tokens forge all of the second one
    cut = scored(prm(folders["one"], max_tokens=4))[2].measurement
    assert cut.rows.reward.tolist() == pytest.approx([0.5, STEPS[2]], abs=1e-5)
    assert [labels for _, _, labels in cut.steps] == [(1, -1), (0,)]
    forged = scored(prm(folders["mlp"], option("qwen_prm")), written=texts(("a\n", "!"), ("<extra_0>",)))[2].measurement
    assert forged.rows.outcome.tolist() == [1.0]
    assert len(forged.steps) == 1


def test_a_rank_without_rows_takes_part(folders):
    nobody = chosen_rows(GIVEN, torch.zeros(0, dtype=torch.int64))
    rewards, present, scores = scored(prm(folders["one"]), nobody, ())
    assert rewards == present == []
    assert len(scores.measurement.rows) == len(scores.measurement.steps) == 0
    told = scored(prm(folders["one"]))[2]
    assert global_numbers([told.metrics, scores.metrics]) == {"prm/frac_steps_cut": 0.0, "prm/frac_forged": 0.0}


def test_attention_is_that_of_the_run(folders):
    assert prm(folders["one"], attention="eager")._prm._model.config._attn_implementation == "eager"


def test_texts_and_tokens_must_have_the_same_steps(folders):
    with pytest.raises(AlignmentError, match=r"row 0 \(a/0\) has 2 steps by its tokens and 3 by its text"):
        scored(prm(folders["one"]), written=texts(("a", "b", "c"), ("!!",)))
    with pytest.raises(AlignmentError, match="needs the texts of responses and got none"):
        prm(folders["one"]).score(scorable(GIVEN, ref=ZEROS))
    with pytest.raises(AlignmentError, match="needs log-probs of the reference and got none"):
        prm(folders["one"]).score(scorable(GIVEN, texts=TEXTS))


def test_model_that_sees_what_follows_is_refused(folders, monkeypatch: pytest.MonkeyPatch):
    from rlprm.engine import model as models

    whole = models.hidden_states

    def sighted(model, micro):
        return whole(model, micro) - micro.positions.amax(1)[:, None, None] * torch.tensor([0.0, 0.0, 0.0, 0.02])

    monkeypatch.setattr(models, "hidden_states", sighted)
    with pytest.raises(ConfigError, match=r"is not causal: the first step's number is .* use a decoder"):
        prm(folders["one"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": None, "learner": False, "max_tokens": None}, "needs a model"),
        ({"model": "prm", "learner": True, "max_tokens": None}, "set learner to null"),
        ({"model": "prm", "learner": False, "max_tokens": 1}, "max_tokens is 1; expected at least 2"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_starts(given, message):
    with pytest.raises(ConfigError, match=message):
        DiscriminativePrm.check(range="probability", format={}, **given)


def test_it_pays_by_step_and_never_learns(folders):
    assert DiscriminativePrm.granularity(range="probability", format={}, max_tokens=None) == "step"
    source = prm(folders["one"])
    learned = source.learn(scorable(GIVEN))
    assert (learned.partial, learned.agreed) == ({}, {})
    assert not source.stateful
