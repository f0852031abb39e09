"""The embedded task's judge, over real HTTP: right by the task's own checker, and wrong at the rate that is asked for."""

from __future__ import annotations

import json
import socket

import httpx
import pytest

from rlprm.data.tasks.chain_arithmetic import ChainArithmetic, verify
from rlprm.errors import ConfigError, DataError
from rlprm.sources.judge_clients import Asked
from rlprm.sources.judge_endpoint import EndpointClient
from rlprm.sources.judge_prompts import (
    OneStepProbability,
    PrincipleScores,
    ReasoningQuality,
    Rubric,
    StepVerdicts,
    WholeVerdict,
)
from rlprm.sources.judge_server import JudgeServer
from tests.unit.sources.judged import VERDICTS, chain_judge, endpoint, row

WRONG = ["3+5=4\n", "4*2=1"]  # the first step is wrong, the second goes on from it correctly; the answer is 2
TEXT = {"instructions": "Judge.", "gold": False}


def vote_on(prompt, given, judge=None):
    with JudgeServer(judge or chain_judge(), 0) as server:
        client = EndpointClient(endpoint(server.url))
        questions = prompt.questions(given, 0)
        replies = client.replies([Asked(question=q, seeds=(1,), temperature=0.0, max_tokens=999) for q in questions])
        client.close()
    return prompt.vote(given, questions, [each[0] for each in replies])


def test_every_kind_of_judgement_is_answered():
    given = row(WRONG)
    vote = vote_on(StepVerdicts(**TEXT, overall=True), given)
    assert (vote.steps, vote.verdict) == ((0.0, 1.0), 0.0)
    assert vote_on(WholeVerdict(**TEXT), given).verdict == 0.0
    assert vote_on(WholeVerdict(**TEXT), row(["3+5=1\n", "1*2=2"])).verdict == 1.0
    assert vote_on(PrincipleScores(**TEXT, most=5), given).steps == (0.0, 1.0)
    assert vote_on(Rubric(**TEXT, levels=7), given).verdict == 0.5  # half of the steps: level 4
    assert vote_on(ReasoningQuality(**TEXT), given).verdict == 0.5
    assert vote_on(OneStepProbability(**TEXT), given).steps == (pytest.approx(0.05), pytest.approx(0.95))


def test_without_mistakes_it_agrees_with_the_task_on_every_step():
    task = ChainArithmetic(modulus=7, operations=(5, 5))
    beliefs = task.misconceptions(seed=0, share=0.3)
    prompt = StepVerdicts(**VERDICTS)
    wrong_steps = 0
    for problem, (text, response) in zip(
        (task.problem(seed=1, index=index, split="train") for index in range(20)),
        task.sft(seed=1, count=20, beliefs=beliefs, probability=1.0),
        strict=True,
    ):
        steps = response.splitlines(keepends=True)
        (question,) = prompt.questions(row(steps, question=text, gold=problem.gold), 0)
        found = question.form.read(question.marker, chain_judge().reply(question.text, 0))
        labels = verify(problem.gold, response, text)[2]
        assert found == tuple(float(label) for label in labels)
        wrong_steps += labels.count(0)
    assert wrong_steps > 5


def test_wrong_verdicts_and_unreadable_replies_come_at_their_rates_and_repeat_with_the_seed():
    (question,) = StepVerdicts(**VERDICTS).questions(row(WRONG), 0)
    judge = chain_judge(error_rate=0.3, unparsable_rate=0.2)
    replies = [judge.reply(question.text, seed) for seed in range(2000)]
    assert replies == [judge.reply(question.text, seed) for seed in range(2000)]
    found = [question.form.read(question.marker, reply) for reply in replies]
    read = [values for values in found if values is not None]
    assert 0.17 < 1 - len(read) / len(found) < 0.23
    assert 0.27 < sum((step != right) for values in read for step, right in zip(values, (0.0, 1.0), strict=True)) / (
        2 * len(read)
    ) < 0.33  # fmt: skip
    assert replies != [
        chain_judge(error_rate=0.3, unparsable_rate=0.2, seed=1).reply(question.text, s) for s in range(2000)
    ]


def test_malformed_and_blank_lines_are_wrong_steps():
    (question,) = StepVerdicts(**VERDICTS).questions(row(["hm\n\n", "1*2=2\n", "extra"]), 0)
    assert question.form.read(question.marker, chain_judge().reply(question.text, 0)) == (0.0, 0.0, 0.0)


def test_it_listens_on_loopback_only_and_refuses_what_is_no_request():
    with JudgeServer(chain_judge(), 0) as server:
        port = int(server.url.split(":")[2].split("/")[0])
        assert server._server.server_address[0] == "127.0.0.1"
        with httpx.Client(trust_env=False) as http:
            assert http.get(f"{server.url}/models").json()["data"][0]["id"] == "chain-arithmetic-judge"
            assert http.get(f"{server.url}/other").status_code == 404
            assert http.post(f"{server.url}/embeddings", json={}).status_code == 404
            for body in (
                "{",
                "[]",
                "{}",
                json.dumps({"messages": [{"content": "hello"}]}),
                json.dumps({"messages": 3}),
            ):
                assert http.post(f"{server.url}/chat/completions", content=body).status_code == 400
            huge = {"content-length": str(1 << 40)}
            with socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
                lines = [f"{name}: {value}" for name, value in huge.items()]
                raw.sendall("\r\n".join(["POST /v1/chat/completions HTTP/1.1", "host: x", *lines, "", ""]).encode())
                assert b"413" in raw.recv(64)
        assert server.answered == 0


def test_a_limit_on_the_reply_cuts_it():
    (question,) = StepVerdicts(**VERDICTS).questions(row(WRONG), 0)
    with JudgeServer(chain_judge(), 0) as server:
        client = EndpointClient(endpoint(server.url))
        (reply,) = client.replies([Asked(question=question, seeds=(1,), temperature=0.0, max_tokens=3)])[0]
        client.close()
    assert reply.text == ""


def test_rates_outside_0_to_1_are_refused():
    with pytest.raises(ConfigError, match=r"error_rate is 1\.5"):
        chain_judge(error_rate=1.5)
    with pytest.raises(DataError, match="asks for no verdict line"):
        chain_judge().reply("What is the weather?", 0)
