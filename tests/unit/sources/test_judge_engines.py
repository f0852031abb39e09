"""A judge on engines of its own: its own tokens, its own template, and probabilities from log-probs of both words."""

from __future__ import annotations

import math
from functools import partial

import pytest

from rlprm.data.templates import chat, plain
from rlprm.errors import ConfigError
from rlprm.roles import Rollout
from rlprm.sources.judge import GenerativeJudge
from rlprm.sources.judge_clients import Asked
from rlprm.sources.judge_engines import OwnEngines
from rlprm.sources.judge_prompts import OneStepProbability, StepVerdicts
from tests.unit.made import context, scorable, shard
from tests.unit.sources.judged import VERDICTS, row, settings


class Letters:
    """A tokenizer with one token per letter, and one each for `` yes``, `` no`` and the end."""

    bos_token_id = unk_token_id = None
    eos_token_id = 1
    all_special_ids = (1,)
    all_special_tokens = ("<end>",)
    words = (" yes", " no", "<end>")

    def __call__(self, text, *, add_special_tokens, verbose=True):
        ids = []
        while text:
            word = next((word for word in self.words if text.startswith(word)), None)
            ids.append({" yes": 2, " no": 3, "<end>": 1}[word] if word else 10 + ord(text[0]))
            text = text[len(word) if word else 1 :]
        return {"input_ids": ids}

    def apply_chat_template(self, conversation, **options):
        raise AssertionError("the plain template needs none")

    def get_chat_template(self, chat_template=None):
        raise ValueError("none")

    def decode(self, tokens, *, skip_special_tokens):
        text = {1: "", 2: " yes", 3: " no"}
        return "".join(text[token] if token in text else chr(token - 10) for token in tokens)


class Scripted:
    """Engines whose every reply is made by a function of the prompt."""

    def __init__(self, reply, *, finish="stop"):
        self.reply, self.finish = reply, finish
        self.requests, self.scored = [], []

    def sample(self, requests):
        self.requests += requests
        return [[self._rollout(request, sample) for sample in range(len(request.seeds))] for request in requests]

    def _rollout(self, request, sample):
        text = self.reply(request.prompt.text)
        tokens = tuple(Letters()(text, add_special_tokens=False)["input_ids"])
        return Rollout(
            prompt=request.prompt,
            sample=sample,
            tokens=(*tokens, 1),
            logprobs=(0.0,) * (len(tokens) + 1),
            finish=self.finish,
            version=0,
            seed=request.seeds[sample],
        )

    def logprobs(self, tokens, temperature):
        assert temperature == 1.0
        self.scored += tokens
        return [[0.0] * (len(row) - 1) + [math.log({2: 0.6, 3: 0.2}[row[-1]])] for row in tokens]


def client_of(engines, **changes):
    settings = {
        "template": lambda tokenizer: plain(tokenizer, format="{question}", bos="auto"),
        "max_prompt_tokens": 5000,
    }
    return OwnEngines(**{**settings, **changes}).connect(context(engines=engines, tokenizer=Letters()))


def asked(prompt, steps=("3+5=1",), seeds=(1,)):
    return [
        Asked(question=question, seeds=tuple(seeds), temperature=0.7, max_tokens=50)
        for question in prompt.questions(row(list(steps)), 0)
    ]


def last_line(text):
    return text.rsplit("\n", 1)[1]


def test_requests_carry_the_judges_own_tokens_and_a_seed_for_each_vote():
    engines = Scripted(lambda text: last_line(text).replace("<right|wrong>", "right"))
    (each,) = asked(StepVerdicts(**VERDICTS), seeds=(3, 4))
    replies = client_of(engines).replies([each])
    (request,) = engines.requests
    assert request.prompt.tokens == tuple(Letters()(each.question.text, add_special_tokens=False)["input_ids"])
    assert (request.seeds, request.temperature, request.max_tokens) == ((3, 4), 0.7, 50)
    assert [each.question.form.read(each.question.marker, reply.text) for reply in replies[0]] == [(1.0,), (1.0,)]
    assert engines.scored == []


def test_the_probability_compares_both_words_after_the_same_prefix():
    engines = Scripted(lambda text: f"Fine.\n{last_line(text).replace('<yes|no>', 'no')}")
    (each,) = asked(OneStepProbability(instructions="Is it?", gold=False))
    ((reply,),) = client_of(engines).replies([each])
    assert reply.probability == pytest.approx(0.75)  # 0.6 / (0.6 + 0.2), whichever word was said
    yes, no = engines.scored
    assert yes[:-1] == no[:-1]
    assert (yes[-1], no[-1]) == (2, 3)
    assert (
        Letters().decode(yes, skip_special_tokens=True)
        == f"{each.question.text}Fine.\nverdict {each.question.marker}: yes"
    )


def test_without_a_verdict_line_or_with_a_word_of_several_tokens_there_is_no_probability():
    # "YES" is three letters to this tokenizer: no single token to compare
    replies = iter(["I cannot tell.", None])

    def reply(text):
        said = next(replies)
        return last_line(text).replace("<yes|no>", "YES") if said is None else said

    engines = Scripted(reply)
    given = asked(OneStepProbability(instructions="Is it?", gold=False), steps=("a\n", "b"))
    found = client_of(engines).replies(given)
    assert [reply.probability for (reply,) in found] == [None, None]
    assert engines.scored == []


def test_what_does_not_fit_is_not_asked_and_what_was_cut_has_no_text():
    engines = Scripted(lambda text: "x")
    short, long = asked(StepVerdicts(**VERDICTS))[0], asked(StepVerdicts(**VERDICTS), steps=("9" * 6000,))[0]
    found = client_of(engines).replies([long, short])
    assert found[0] == [None]
    assert found[1][0].text == "x"
    assert len(engines.requests) == 1
    ((reply,),) = client_of(Scripted(lambda text: "x", finish="length")).replies([short])
    assert reply.text == ""


def test_a_response_that_spells_the_judges_special_token_does_not_end_the_turn():
    engines = Scripted(lambda text: "x")
    client_of(engines).replies(asked(StepVerdicts(**VERDICTS), steps=("3+5=1<end>",)))
    (request,) = engines.requests
    assert 1 not in request.prompt.tokens
    assert "3+5=1< end>" in request.prompt.text


def test_engines_without_a_model_are_refused():
    engines = OwnEngines(template=chat, max_prompt_tokens=10)
    with pytest.raises(ConfigError, match="neither an endpoint nor a model"):
        engines.check(None)
    engines.check("folder")
    with pytest.raises(ConfigError, match="max_prompt_tokens is 0"):
        OwnEngines(template=chat, max_prompt_tokens=0).check("folder")


def test_a_real_model_that_has_learnt_nothing_gives_no_vote(tmp_path):
    """The whole way through a real tokenizer and a real engine, without a run around it."""
    from rlprm.core.metrics import numbers
    from rlprm.data.tasks.chain_arithmetic import write_model_folder
    from rlprm.data.tokenizer import load_tokenizer, stop_token_ids
    from rlprm.engine.generator_hf import HfGenerator, HfSettings

    write_model_folder(tmp_path, 1, hidden=32, layers=1, heads=2, mlp=64, context=1024)
    tokenizer = load_tokenizer(str(tmp_path))
    generator = HfGenerator(
        str(tmp_path),
        HfSettings(
            dtype="float32",
            device="cpu",
            max_model_len=801,
            max_num_seqs=8,
            stop_token_ids=stop_token_ids(str(tmp_path), tokenizer),
        ),
    )

    class InOrder:
        def sample(self, requests):
            found = {rollouts[0].seed: rollouts for rollouts in generator.generate(requests)}
            return [found[request.seeds[0]] for request in requests]

        def logprobs(self, tokens, temperature):
            return generator.logprobs(tokens, temperature) if tokens else []

    own = OwnEngines(template=partial(plain, format="{question}", bos="never"), max_prompt_tokens=768)
    made = shard([12, 12], [1.0, 0.0], steps=[[0] * 6 + [1] * 6] * 2)
    given = scorable(made, texts=(row(["3+5=1\n", "1*2=2\n"]), row(["3+5=4\n", "4*2=1\n"])))
    for prompt in (StepVerdicts(**VERDICTS), OneStepProbability(instructions="Is it?", gold=False)):
        source = GenerativeJudge(
            context(engines=InOrder(), tokenizer=tokenizer), **settings(client=own, judgement=prompt, max_tokens=32)
        )
        scores = source.score(given)
        assert not any(stream.present.any() for stream in scores.streams.values())
        found = numbers(scores.metrics.partial)
        assert (found["judge/process/frac_failed"], found["judge/process/frac_unparsed"]) == (0.0, 1.0)
        assert found["judge/process/frac_absent"] == 1.0
