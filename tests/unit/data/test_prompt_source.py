"""The order of prompts: weighted, shuffled per epoch, exactly resumable; and held-out sets."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlprm.data.datasets import Columns, Row, jsonl
from rlprm.data.prompt_source import PromptSource, Source, held_out, shuffled
from rlprm.data.templates import chat
from rlprm.errors import CheckpointError, DataError

GSM8K = Path(__file__).parents[2] / "data" / "gsm8k_small"


def render(question):
    return f"Q {question}", tuple(f"Q {question}".encode())


def rows(size, name="r", gold="2"):
    return [Row(id=str(i), question=f"{name}{i}", gold=gold, source=f"{name}.jsonl:{i + 1}") for i in range(size)]


def prompt_source(*sources, seed=0, max_prompt_tokens=32, render=render):
    return PromptSource(
        [Source(name, list_of_rows, float(weight)) for name, list_of_rows, weight in sources],
        render,
        seed=seed,
        max_prompt_tokens=max_prompt_tokens,
    )


def ids(prompts):
    return [prompt.id for prompt in prompts]


def test_a_prompt_holds_what_the_template_rendered():
    (prompt,) = prompt_source(("sums", rows(1), 1)).take(1)
    assert (prompt.id, prompt.text, prompt.gold, prompt.source) == ("sums/0", "Q r0", "2", "sums")
    assert prompt.tokens == tuple(b"Q r0")


def test_largest_deficit_interleave():
    # Shares 3/4 and 1/4. Behind by, before each prompt: a .75, b .25 -> a; a .5, b .5 -> a (first named);
    # a .25, b .75 -> b; a 1, b 0 -> a; and so on, period 4.
    taken = prompt_source(("a", rows(9), 3), ("b", rows(9), 1)).take(8)
    assert [prompt.source for prompt in taken] == ["a", "a", "b", "a"] * 2


def test_every_row_once_per_epoch_in_a_new_order():
    source = prompt_source(("a", rows(20), 1))
    first, second = ids(source.take(20)), ids(source.take(20))
    assert sorted(first) == sorted(second) == sorted(f"a/{i}" for i in range(20))
    assert first != second
    assert first != [f"a/{i}" for i in range(20)]


def test_the_order_depends_on_seed_and_name_but_not_on_the_order_of_rows():
    order = ids(prompt_source(("a", rows(20), 1)).take(20))
    assert order == ids(prompt_source(("a", rows(20)[::-1], 1)).take(20))
    assert order != ids(prompt_source(("a", rows(20), 1), seed=1).take(20))
    assert [i.split("/")[1] for i in order] != [
        i.split("/")[1] for i in ids(prompt_source(("b", rows(20), 1)).take(20))
    ]


def test_the_shuffle_is_the_same_everywhere():
    # printf 'k\0a' | sha256sum: 44c338b5...; with b: dbaf55f4...; with c: 467ac7d5...; ascending: a, c, b
    assert shuffled(["a", "b", "c"], "k") == [0, 2, 1]


def test_sources_of_unequal_size_cycle_on_their_own():
    source = prompt_source(("big", rows(10), 1), ("small", rows(2), 1))
    taken = Counter(ids(source.take(20)))
    assert [taken[f"big/{i}"] for i in range(10)] == [1] * 10
    assert [taken[f"small/{i}"] for i in range(2)] == [5, 5]
    assert source.metrics()["data/big/epoch"] == 1.0
    assert source.metrics()["data/small/epoch"] == 5.0


def test_too_long_prompts_and_rows_without_gold_are_left_out_and_counted():
    long = Row(id="long", question="x" * 40, gold="2", source="r.jsonl:9")
    unknown = Row(id="unknown", question="x", gold=None, source="r.jsonl:10")
    source = prompt_source(("a", [*rows(3), long, unknown], 1))
    assert len(source) == 3
    assert set(ids(source.take(6))) == {"a/0", "a/1", "a/2"}
    assert source.metrics() == {
        "data/a/num_rows": 5.0,
        "data/a/num_without_gold": 1.0,
        "data/a/num_too_long": 1.0,
        "data/a/epoch": 2.0,
    }


def test_the_limit_is_inclusive():
    assert len(prompt_source(("a", rows(1), 1), max_prompt_tokens=4)) == 1  # "Q r0" has 4 bytes
    with pytest.raises(DataError, match=r"all 1 prompts of 'a'.*max_prompt_tokens=3; the shortest has 4 .*r\.jsonl:1"):
        prompt_source(("a", rows(1), 1), max_prompt_tokens=3)


def test_no_row_with_a_gold_answer():
    with pytest.raises(DataError, match="none of the 2 rows of 'a' has a gold answer"):
        prompt_source(("a", rows(2, gold=None), 1))


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "no data sources"),
        ([("a", [], 1)], "a is empty"),
        ([("a", rows(1), 0)], r"'a' has weight 0\.0"),
        ([("a", rows(1), float("nan"))], "'a' has weight nan"),
        ([("a/b", rows(1), 1)], "data source name 'a/b'"),
        ([("a", rows(1), 1), ("a", rows(2), 1)], "2 data sources are named 'a'"),
        ([("a", [*rows(1), *rows(1)], 1)], "have the same id '0'"),
    ],
)
def test_sources_that_cannot_be_mixed(sources, message):
    with pytest.raises(DataError, match=message):
        prompt_source(*sources)


def test_an_error_of_the_template_names_the_row():
    def refusing(question):
        if question == "r1":
            raise DataError("the question spells a special token")
        return render(question)

    with pytest.raises(DataError, match=r"r\.jsonl:2: the question spells"):
        prompt_source(("a", rows(3), 1), render=refusing)
    with pytest.raises(DataError, match=r"r\.jsonl:1: the prompt has no tokens"):
        prompt_source(("a", rows(3), 1), render=lambda question: ("", ()))


sizes = st.lists(st.integers(1, 7), min_size=1, max_size=4)
weights = st.lists(st.floats(0.01, 100.0), min_size=4, max_size=4)


@settings(deadline=None)
@given(sizes=sizes, weights=weights, batches=st.lists(st.integers(0, 9), max_size=5), seed=st.integers(0, 9))
def test_a_restored_source_goes_on_exactly(sizes, weights, batches, seed):
    mixed = [(f"s{i}", rows(size, f"s{i}"), weights[i]) for i, size in enumerate(sizes)]
    source = prompt_source(*mixed, seed=seed)
    for batch in batches:
        source.take(batch)
    state = json.loads(json.dumps(source.state()))
    restored = prompt_source(*mixed, seed=seed)
    restored.take(3)  # what was taken before the restore does not matter
    restored.restore(state)
    assert restored.take(25) == source.take(25)
    assert restored.state() == source.state()


@settings(deadline=None)
@given(sizes=sizes, weights=weights, total=st.integers(1, 200))
def test_shares_are_kept_to_within_the_number_of_sources_less_one(sizes, weights, total):
    mixed = [(f"s{i}", rows(size, f"s{i}"), weights[i]) for i, size in enumerate(sizes)]
    taken = Counter(prompt.source for prompt in prompt_source(*mixed).take(total))
    share = [weight / sum(weights[: len(sizes)]) for weight in weights[: len(sizes)]]
    for i, wanted in enumerate(share):
        ahead = taken[f"s{i}"] - wanted * total
        # A source is served only when it is behind, so it is never a whole prompt ahead; its lag is the others' leads.
        assert -max(1, len(sizes) - 1) - 1e-9 < ahead < 1 + 1e-9


@settings(deadline=None)
@given(sizes=sizes, batches=st.lists(st.integers(0, 9), max_size=5))
def test_batch_sizes_do_not_change_the_order(sizes, batches):
    mixed = [(f"s{i}", rows(size, f"s{i}"), 1 + i) for i, size in enumerate(sizes)]
    source = prompt_source(*mixed)
    assert [prompt for batch in batches for prompt in source.take(batch)] == prompt_source(*mixed).take(sum(batches))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"max_prompt_tokens": 31}, "max_prompt_tokens was 32 and is 31"),
        ({"render": lambda question: (question, tuple(question.encode()))}, "template, tokenizer .* prompts for 'a'"),
    ],
)
def test_resuming_with_other_settings_names_them(change, message):
    state = prompt_source(("a", rows(4), 1)).state()
    with pytest.raises(CheckpointError, match=message):
        prompt_source(("a", rows(4), 1), **change).restore(state)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([("a", rows(4), 2), ("b", rows(4), 1)], r"a\.weight was 1\.0 and is 2\.0\. Resume"),
        ([("a", rows(5), 1), ("b", rows(4), 1)], r"checkpoint: the rows of 'a' changed\. Resume"),
        ([("a", rows(4), 1), ("b", rows(4, gold="3"), 1)], r"checkpoint: the rows of 'b' changed\. Resume"),
        ([("a", rows(4), 1)], r"checkpoint: source 'b' is gone\. Resume"),
        ([("a", rows(4), 1), ("b", rows(4), 1), ("c", rows(4), 1)], r"checkpoint: source 'c' is new\. Resume"),
    ],
)
def test_resuming_with_other_data_names_them(sources, message):
    state = prompt_source(("a", rows(4), 1), ("b", rows(4), 1)).state()
    with pytest.raises(CheckpointError, match=message):
        prompt_source(*sources).restore(state)


def test_resuming_from_the_same_data_elsewhere_is_allowed():
    moved = [Row(id=row.id, question=row.question, gold=row.gold, source="/other" + row.source) for row in rows(4)]
    source = prompt_source(("a", rows(4), 1))
    source.take(3)
    restored = prompt_source(("a", moved, 1))
    restored.restore(source.state())
    assert ids(restored.take(5)) == ids(source.take(5))


@pytest.mark.parametrize("damage", [{"taken": {"a": -1}}, {"taken": {"b": 1}}, {"taken": {"a": 1.5}}, {"taken": None}])
def test_a_damaged_state_is_refused(damage):
    source = prompt_source(("a", rows(4), 1))
    with pytest.raises(CheckpointError, match="the data cursor"):
        source.restore({**source.state(), **damage})


def test_held_out_keeps_the_order_of_the_rows():
    found = held_out("dev", rows(5), render, max_prompt_tokens=32, limit=None, seed=0)
    assert ids(found.prompts) == [f"dev/{i}" for i in range(5)]
    assert (found.name, found.num_rows, found.num_without_gold, found.num_too_long) == ("dev", 5, 0, 0)


def test_held_out_limit_is_a_seeded_choice_and_a_beginning():
    def take(limit, seed=0):
        return ids(held_out("dev", rows(30), render, max_prompt_tokens=32, limit=limit, seed=seed).prompts)

    assert take(10) == take(20)[:10]
    assert take(10) != take(10, seed=1)
    assert take(10) != [f"dev/{i}" for i in range(10)]
    assert sorted(take(99)) == sorted(f"dev/{i}" for i in range(30))


def test_held_out_counts_what_is_left_out():
    long = Row(id="long", question="x" * 40, gold="2", source="r.jsonl:9")
    unknown = Row(id="unknown", question="x", gold=None, source="r.jsonl:10")
    found = held_out("dev", [long, unknown, *rows(2)], render, max_prompt_tokens=32, limit=None, seed=0)
    assert ids(found.prompts) == ["dev/0", "dev/1"]
    assert (found.num_rows, found.num_without_gold, found.num_too_long) == (4, 1, 1)


def test_held_out_needs_rows_and_a_limit():
    with pytest.raises(DataError, match="dev is empty"):
        held_out("dev", [], render, max_prompt_tokens=32, limit=None, seed=0)
    with pytest.raises(DataError, match="limit 0; expected at least 1"):
        held_out("dev", rows(2), render, max_prompt_tokens=32, limit=0, seed=0)


def test_gsm8k_through_a_chat_template(tokenizer):
    columns = Columns(
        question="question",
        answer="answer",
        gold_pattern="#### (.+)$",
        gold_remove=",",
        missing_gold="refuse",
        id=None,
    )
    bound = chat(tokenizer, system=None, format=r"{question} Use \boxed{}.", jinja=None, arguments={})
    train = jsonl(str(GSM8K / "train.jsonl"), columns=columns)
    source = PromptSource([Source("gsm8k", train, 1.0)], bound, seed=0, max_prompt_tokens=400)
    prompts = source.take(len(source))
    lengths = {f"gsm8k/{row.id}": len(bound(row.question)[1]) for row in train}
    assert 0 < len(prompts) < 16  # some of the sixteen are over 400 bytes
    assert set(ids(prompts)) == {name for name, length in lengths.items() if length <= 400}
    assert source.metrics()["data/gsm8k/num_too_long"] == 16 - len(prompts)
    assert all(prompt.tokens.count(tokenizer.bos_token_id) == 1 for prompt in prompts)
