"""Left-to-right modular arithmetic, one operation a line: a task whose every step has an exact label.

The prompt is an expression and a newline, ``3+5*2\\n``. The response works it off from left to right, one line an
operation, modulo a prime, and the last line's value is the answer::

    3+5=1
    1*2=2

Operands are never 0, so each operation is a bijection of the running value: a wrong value stays wrong until another
mistake happens to repair it. That is what keeps outcomes faithful to steps, which a composite modulus does not.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlprm.errors import ConfigError, DataError

Split = Literal["train", "test"]
Fact = tuple[int, str, int]  # (a, operator, b), the left side of one line

OPERATORS = "+-*"
PAD, EOS, BOS, UNKNOWN = "<pad>", "<eos>", "<bos>", "<unk>"
CHARACTERS = "\n0123456789+-*="
TEST_BUCKETS = 8  # one expression in eight belongs to the test split

_NUMBER = r"(0|[1-9]\d*)"
_LINE = re.compile(rf"{_NUMBER}([+*-]){_NUMBER}={_NUMBER}")
_EXPRESSION = re.compile(rf"{_NUMBER}((?:[+*-]{_NUMBER})+)\n")
_OPERATION = re.compile(rf"([+*-]){_NUMBER}")
_GOLD = re.compile(rf"{_NUMBER} mod {_NUMBER}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One expression: ``start``, then ``operations`` applied from left to right modulo ``modulus``.

    >>> problem = Problem(start=3, operations=(("+", 5), ("*", 2)), modulus=7)
    >>> problem.prompt, problem.gold, problem.solution
    ('3+5*2\\n', '2 mod 7', '3+5=1\\n1*2=2')
    """

    start: int
    operations: tuple[tuple[str, int], ...]
    modulus: int

    @property
    def prompt(self) -> str:
        """The expression and a newline."""
        return f"{self.start}{''.join(f'{operator}{operand}' for operator, operand in self.operations)}\n"

    @property
    def gold(self) -> str:
        """The answer and the modulus it holds in, ``"2 mod 7"``: all that :func:`verify` needs beside the prompt."""
        value = self.start
        for operator, operand in self.operations:
            value = apply((value, operator, operand), self.modulus)
        return f"{value} mod {self.modulus}"

    @property
    def solution(self) -> str:
        """The response without any mistake."""
        return self.work_out({}, 0.0, random.Random(0))

    def work_out(self, beliefs: Mapping[Fact, int], probability: float, rng: random.Random) -> str:
        """The response of somebody who answers each fact in ``beliefs`` with the wrong value given there, each time
        with ``probability``, and goes on from the value they wrote down.

        >>> problem = Problem(start=3, operations=(("+", 5), ("*", 2)), modulus=7)
        >>> problem.work_out({(3, "+", 5): 4}, 1.0, random.Random(0))
        '3+5=4\\n4*2=1'
        """
        lines = []
        value = self.start
        for operator, operand in self.operations:
            fact = (value, operator, operand)
            mistaken = fact in beliefs and rng.random() < probability
            value = beliefs[fact] if mistaken else apply(fact, self.modulus)
            lines.append(f"{fact[0]}{operator}{operand}={value}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainArithmetic:
    """The seeded source of problems: ``operations`` = (fewest, most) lines a chain, the task's difficulty.

    Whether an expression is a train or a test problem is decided by a hash of its text, so the two splits share no
    expression whatever the seeds.

    >>> task = ChainArithmetic(modulus=7, operations=(2, 2))
    >>> task.problem(seed=0, index=0, split="train") == task.problem(seed=0, index=0, split="train")
    True
    """

    modulus: int = 7
    operations: tuple[int, int] = (5, 5)
    operators: str = OPERATORS

    def __post_init__(self) -> None:
        if self.modulus < 3 or any(self.modulus % divisor == 0 for divisor in range(2, int(self.modulus**0.5) + 1)):
            raise ConfigError(f"modulus is {self.modulus}; expected an odd prime, so that a wrong value stays wrong")
        fewest, most = self.operations
        if not 1 <= fewest <= most:
            raise ConfigError(f"operations is {self.operations}; expected (fewest, most) with 1 <= fewest <= most")
        if not self.operators or not set(self.operators) <= set(OPERATORS):
            raise ConfigError(f"operators is {self.operators!r}; expected one or more of {OPERATORS!r}")

    def problem(self, *, seed: int, index: int, split: Split) -> Problem:
        """Problem ``index`` of ``split``: a function of its arguments alone, so any order can be resumed."""
        rng = random.Random(f"chain_arithmetic/{seed}/{split}/{index}")
        while True:
            operations = tuple(
                (rng.choice(self.operators), rng.randrange(1, self.modulus))
                for _ in range(rng.randint(*self.operations))
            )
            problem = Problem(start=rng.randrange(1, self.modulus), operations=operations, modulus=self.modulus)
            if split_of(problem.prompt) == split:
                return problem

    def misconceptions(self, *, seed: int, share: float) -> dict[Fact, int]:
        """A fixed wrong value for ``share`` of all facts (a, operator, b), drawn with ``seed``.

        >>> task = ChainArithmetic(modulus=7)
        >>> len(task.misconceptions(seed=0, share=0.2))  # of 7 * 3 * 6 = 126 facts
        25

        Raises:
            ConfigError: ``share`` is outside [0, 1].
        """
        _expect_fraction("share", share)
        facts = [
            (a, operator, b) for a in range(self.modulus) for operator in self.operators for b in range(1, self.modulus)
        ]
        rng = random.Random(f"misconceptions/{seed}")
        chosen = rng.sample(facts, round(share * len(facts)))
        return {
            fact: rng.choice([value for value in range(self.modulus) if value != apply(fact, self.modulus)])
            for fact in chosen
        }

    def sft(
        self, *, seed: int, count: int, beliefs: Mapping[Fact, int], probability: float
    ) -> Iterator[tuple[str, str]]:
        """``count`` warm-up texts (prompt, response) from the train split, worked out with systematic misconceptions.

        A warm-up whose errors are sampling noise proves nothing: greedy decoding is then right already. Misconceptions
        survive any temperature, and only reward can undo them.

        >>> task = ChainArithmetic(modulus=7, operations=(1, 1))
        >>> [(prompt, response)] = task.sft(seed=0, count=1, beliefs={}, probability=0.0)
        >>> verify(task.problem(seed=0, index=0, split="train").gold, response, prompt)[0]
        1.0

        Raises:
            ConfigError: ``probability`` is outside [0, 1].
        """
        _expect_fraction("probability", probability)
        for index in range(count):
            problem = self.problem(seed=seed, index=index, split="train")
            yield problem.prompt, problem.work_out(beliefs, probability, random.Random(f"sft/{seed}/{index}"))


def apply(fact: Fact, modulus: int) -> int:
    """(a operator b) mod modulus.

    >>> apply((3, "-", 5), 7)
    5
    """
    a, operator, b = fact
    return {"+": a + b, "-": a - b, "*": a * b}[operator] % modulus


def split_of(prompt: str) -> Split:
    """The split an expression belongs to, from a hash of its text (one in eight is ``"test"``)."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") % TEST_BUCKETS == 0 else "train"


def verify(gold: str, response: str, prompt: str) -> tuple[float, str, tuple[int, ...]]:
    """outcome = 1 if every line is well formed, there is one line per operation and the last value is gold's; else 0.

    ``steps`` labels each line: 1 if its own arithmetic is right **and** it continues from the previous line's value
    with the prompt's operation, 0 if not or if the line is malformed or surplus, -1 if it follows a malformed line,
    whose value nobody knows. A line that continues correctly from a wrong value is therefore right.

    >>> verify("2 mod 7", "3+5=4\\n4*2=1", "3+5*2\\n")[2]
    (0, 1)
    >>> verify("2 mod 7", "3+5=1\\n1*2=2", "3+5*2\\n")[:2]
    (1.0, 'right')

    Raises:
        DataError: ``gold`` or ``prompt`` is not of this task.
    """
    matched = _GOLD.fullmatch(gold)
    if matched is None:
        raise DataError(f"gold is {gold!r}; expected '<answer> mod <modulus>', as Problem.gold gives it")
    answer, modulus = int(matched[1]), int(matched[2])
    problem = parse(prompt, modulus)

    lines = response.removesuffix("\n").split("\n") if response else []
    labels: list[int] = []
    malformed = 0
    previous: int | None = problem.start
    for number, line in enumerate(lines):
        statement = _LINE.fullmatch(line)
        if statement is None or number >= len(problem.operations):
            labels.append(0)
            malformed = malformed or number + 1
            previous = None
            continue
        fact: Fact = (int(statement[1]), statement[2], int(statement[3]))
        if previous is None:
            labels.append(-1)
        else:
            labels.append(
                int(fact == (previous, *problem.operations[number]) and int(statement[4]) == apply(fact, modulus))
            )
        previous = int(statement[4])

    if malformed:
        reason = f"line {malformed} is malformed or surplus"
    elif len(lines) != len(problem.operations):
        reason = f"{len(lines)} lines for {len(problem.operations)} operations"
    elif previous != answer:
        reason = f"answer {previous}"
    else:
        reason = "right"
    return float(reason == "right"), reason, tuple(labels)


def parse(prompt: str, modulus: int) -> Problem:
    """The problem that a prompt states.

    >>> parse("3+5*2\\n", 7).operations
    (('+', 5), ('*', 2))

    Raises:
        DataError: the prompt is not an expression and a newline.
    """
    matched = _EXPRESSION.fullmatch(prompt)
    if matched is None:
        raise DataError(f"prompt is {prompt!r}; expected an expression such as '3+5*2' and a newline")
    operations = tuple((operator, int(operand)) for operator, operand in _OPERATION.findall(matched[2]))
    return Problem(start=int(matched[1]), operations=operations, modulus=modulus)


def first_wrong_step(labels: Sequence[int]) -> int:
    """min {h : labels[h] = 0}, or -1 if no step is wrong.

    >>> first_wrong_step((1, 0, 1, 0)), first_wrong_step((1, 1))
    (1, -1)
    """
    return next((step for step, label in enumerate(labels) if label == 0), -1)


def build_tokenizer():
    """A character tokenizer as a real ``PreTrainedTokenizerFast``: one id per character, pad and eos differ.

    It is a byte-level BPE without merges because ``AutoTokenizer`` rebuilds any tokenizer that lies beside a Qwen2
    config as one (with Qwen2's own pre-tokenizer, and without an unknown token): a plain character vocabulary would
    silently lose its newlines there. Characters outside the vocabulary are dropped for the same reason.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = [byte_level.pre_tokenize_str(character)[0][0] for character in CHARACTERS]
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, BOS, UNKNOWN, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=BOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def write_model_folder(
    path: str | Path,
    seed: int,
    *,
    hidden: int = 128,
    layers: int = 3,
    heads: int = 4,
    mlp: int = 320,
    context: int = 256,
) -> None:
    """Write a Qwen2-style model with random weights, its tokenizer and its configs, as any Hugging Face folder.

    ``hidden`` and ``mlp`` are the widths of the residual stream and the MLP, ``context`` the longest sequence in
    tokens. Embeddings are tied, weights are float32: 0.57 M parameters (2.3 MB) with the values given here.

    Raises:
        ConfigError: ``hidden`` is not an even multiple of ``heads``.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    if hidden % (2 * heads):
        raise ConfigError(f"hidden is {hidden} with {heads} heads; expected an even number of dimensions per head")
    tokenizer = build_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_sliding_window=False,
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def _expect_fraction(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"{name} is {value}; expected a fraction from 0 to 1")
