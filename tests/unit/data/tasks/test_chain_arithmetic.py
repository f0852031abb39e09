"""The embedded task: exact labels, disjoint splits, systematic misconceptions, and a folder that Hugging Face loads."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlprm.data.tasks.chain_arithmetic import (
    BOS,
    CHARACTERS,
    EOS,
    PAD,
    ChainArithmetic,
    Problem,
    apply,
    build_tokenizer,
    first_wrong_step,
    parse,
    split_of,
    verify,
    write_model_folder,
)
from rlprm.errors import ConfigError, DataError

# 3+5 = 8 = 1 (mod 7), 1*2 = 2, 2-6 = -4 = 3 (mod 7).
PROBLEM = Problem(start=3, operations=(("+", 5), ("*", 2), ("-", 6)), modulus=7)


def test_the_worked_example():
    assert PROBLEM.prompt == "3+5*2-6\n"
    assert PROBLEM.gold == "3 mod 7"
    assert PROBLEM.solution == "3+5=1\n1*2=2\n2-6=3"
    assert parse(PROBLEM.prompt, 7) == PROBLEM


@pytest.mark.parametrize(
    ("response", "outcome", "steps"),
    [
        ("3+5=1\n1*2=2\n2-6=3", 1.0, (1, 1, 1)),
        ("3+5=1\n1*2=2\n2-6=3\n", 1.0, (1, 1, 1)),  # one closing newline states nothing
        ("3+5=2\n2*2=4\n4-6=5", 0.0, (0, 1, 1)),  # wrong once; continues correctly from the wrong value
        ("3+5=1\n2*2=4\n4-6=5", 0.0, (1, 0, 1)),  # own arithmetic right, but 2 is not the previous value
        ("3+5=1\n1+2=3\n3-6=4", 0.0, (1, 0, 1)),  # not the prompt's operation
        ("3+5=1\n1*2=5\n5-6=3", 1.0, (1, 0, 0)),  # two mistakes cancel: 5-6 = 6, but 3 was the right answer
        ("3+5=1\n1*2=9\n9-6=3", 1.0, (1, 0, 1)),  # 9 = 2 (mod 7) is not the reduced value
        ("3+5=1\n1*=2\n2-6=3", 0.0, (1, 0, -1)),  # malformed: the value that line 3 should continue from is unknown
        ("3+5=1\n1*2=02\n2-6=3", 0.0, (1, 0, -1)),  # leading zero
        ("3+5=1\n1*2=2", 0.0, (1, 1)),  # a line is missing
        ("3+5=1\n1*2=2\n2-6=3\n3+1=4", 0.0, (1, 1, 1, 0)),  # a surplus line
        ("3+5=1\n1*2=2\n2-6=3\n\n", 0.0, (1, 1, 1, 0)),
        ("3", 0.0, (0,)),
        ("\n", 0.0, (0,)),
        ("", 0.0, ()),
    ],
)
def test_verdicts(response, outcome, steps):
    found, reason, labels = verify(PROBLEM.gold, response, PROBLEM.prompt)
    assert (found, labels) == (outcome, steps)
    assert (reason == "right") == (outcome == 1.0)


def test_a_row_of_another_task_is_refused():
    with pytest.raises(DataError, match="expected '<answer> mod <modulus>'"):
        verify("3", PROBLEM.solution, PROBLEM.prompt)
    with pytest.raises(DataError, match="expected an expression"):
        verify("3 mod 7", PROBLEM.solution, "What is 3+5?")


def test_first_wrong_step():
    assert first_wrong_step((1, -1, 0, 0)) == 2  # unknown is not wrong
    assert first_wrong_step((1, -1)) == -1
    assert first_wrong_step(()) == -1


@given(
    seed=st.integers(0, 10**6),
    index=st.integers(0, 10**9),
    modulus=st.sampled_from([3, 5, 7, 11, 13]),
    most=st.integers(1, 9),
)
def test_every_solution_is_right(seed, index, modulus, most):
    task = ChainArithmetic(modulus=modulus, operations=(1, most))
    problem = task.problem(seed=seed, index=index, split="train")
    outcome, _, labels = verify(problem.gold, problem.solution, problem.prompt)
    assert outcome == 1.0
    assert labels == (1,) * len(problem.operations)
    assert 1 <= len(problem.operations) <= most
    assert problem.start != 0
    assert all(operand % modulus for _, operand in problem.operations)


@given(start=st.integers(1, 6), wrong=st.integers(1, 6), index=st.integers(0, 10**6))
def test_a_wrong_value_stays_wrong(start, wrong, index):
    """Each operation is a bijection of the running value, so one wrong first line alone always spoils the answer."""
    problem = ChainArithmetic(modulus=7, operations=(2, 6)).problem(seed=start, index=index, split="test")
    fact = (problem.start, *problem.operations[0])
    off = (apply(fact, 7) + wrong) % 7
    outcome, _, labels = verify(problem.gold, problem.work_out({fact: off}, 1.0, _Once()), problem.prompt)
    assert outcome == 0.0
    assert labels == (0,) + (1,) * (len(problem.operations) - 1)


class _Once(random.Random):
    """Errs at the first draw only."""

    def __init__(self) -> None:
        super().__init__(0)
        self.draws = iter([0.0])

    def random(self) -> float:
        return next(self.draws, 1.0)


def test_splits_share_no_expression_even_across_seeds():
    task = ChainArithmetic(modulus=7, operations=(1, 2))  # 6*18 + 6*18*18 = 2,052 expressions: draws collide often
    train = {task.problem(seed=0, index=index, split="train").prompt for index in range(4000)}
    test = {task.problem(seed=1, index=index, split="test").prompt for index in range(1000)}
    assert len(train) > 1000
    assert len(test) > 150
    assert not train & test
    assert {split_of(prompt) for prompt in train} == {"train"}
    assert {split_of(prompt) for prompt in test} == {"test"}


def test_problems_depend_on_seed_and_index_alone():
    task = ChainArithmetic(modulus=7, operations=(4, 8))
    forwards = [task.problem(seed=3, index=index, split="train") for index in range(50)]
    backwards = [task.problem(seed=3, index=index, split="train") for index in reversed(range(50))]
    assert forwards == backwards[::-1]
    assert len({problem.prompt for problem in forwards}) == 50
    assert forwards != [task.problem(seed=4, index=index, split="train") for index in range(50)]
    assert {len(problem.operations) for problem in forwards} == {4, 5, 6, 7, 8}
    # Pinned: run folders and shipped models refer to problems by (seed, index).
    assert task.problem(seed=0, index=0, split="train").prompt == "4*4-5*4-3-5-6*2*3\n"


def test_misconceptions_are_wrong_and_systematic():
    task = ChainArithmetic(modulus=7, operations=(5, 5))
    beliefs = task.misconceptions(seed=0, share=0.4)
    assert len(beliefs) == 50  # round(0.4 * 126)
    assert all(value != apply(fact, 7) and 0 <= value < 7 for fact, value in beliefs.items())
    assert beliefs == task.misconceptions(seed=0, share=0.4)
    assert beliefs != task.misconceptions(seed=1, share=0.4)

    texts = list(task.sft(seed=5, count=400, beliefs=beliefs, probability=0.7))
    assert texts == list(task.sft(seed=5, count=400, beliefs=beliefs, probability=0.7))
    met = erred = 0
    for prompt, response in texts:
        for line, label in zip(response.split("\n"), verify("0 mod 7", response, prompt)[2], strict=True):
            problem = parse(line[: line.index("=")] + "\n", 7)
            fact = (problem.start, *problem.operations[0])
            if fact not in beliefs:
                assert label == 1
                continue
            met += 1
            erred += label == 0
            assert int(line[line.index("=") + 1 :]) == (apply(fact, 7) if label else beliefs[fact])
    # Five lines by 400 texts meet 40 % of the facts about 800 times; 4 standard errors of 0.7 are 0.065.
    assert 600 < met < 1000
    assert abs(erred / met - 0.7) < 0.065


def test_impossible_tasks_are_refused():
    with pytest.raises(ConfigError, match="modulus is 10"):
        ChainArithmetic(modulus=10)
    with pytest.raises(ConfigError, match="operations is"):
        ChainArithmetic(operations=(3, 2))
    with pytest.raises(ConfigError, match="operators is"):
        ChainArithmetic(operators="/")
    with pytest.raises(ConfigError, match=r"share is 1\.5"):
        ChainArithmetic().misconceptions(seed=0, share=1.5)
    with pytest.raises(ConfigError, match=r"probability is -0\.1"):
        list(ChainArithmetic().sft(seed=0, count=1, beliefs={}, probability=-0.1))
    with pytest.raises(ConfigError, match="hidden is 10"):
        write_model_folder("unused", 0, hidden=10, heads=4)


def test_the_tokenizer_gives_one_id_per_character():
    tokenizer = build_tokenizer()
    text = CHARACTERS + "\n\n" + CHARACTERS[::-1]
    tokens = tokenizer(text).input_ids
    assert len(tokens) == len(text)
    assert tokenizer.decode(tokens) == text
    assert len(tokenizer) == 4 + len(CHARACTERS)
    special = tokenizer.convert_tokens_to_ids([PAD, EOS, BOS])
    assert special == [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id] == [0, 1, 2]
    assert tokenizer.decode([*tokens, 1, 0, 0], skip_special_tokens=True) == text


def test_the_model_folder_loads_as_any_hugging_face_folder(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    write_model_folder(tmp_path / "a", 0)
    assert torch.equal(torch.random.get_rng_state(), before)
    write_model_folder(tmp_path / "b", 0)
    write_model_folder(tmp_path / "c", 1)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]
    assert len(weights[0]) < 4 * 2**20

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert 500_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 5_000_000
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.dtype == torch.float32

    # AutoTokenizer replaces the class beside a Qwen2 config; ids and newlines must survive that.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    text = PROBLEM.prompt + PROBLEM.solution
    assert tokenizer(text).input_ids == build_tokenizer()(text).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert (model.config.pad_token_id, model.config.eos_token_id) == (0, 1)
    assert len(tokenizer) == model.config.vocab_size
