"""The chat-completions client against servers that fail in every way; the key stands in no message."""

from __future__ import annotations

import logging
import math
import threading
import time

import pytest

from rlprm.errors import ConfigError
from rlprm.sources.judge_clients import Asked
from rlprm.sources.judge_endpoint import EndpointClient
from rlprm.sources.judge_prompts import OneStepProbability, StepVerdicts
from tests.unit.made import context
from tests.unit.sources.judged import VERDICTS, endpoint, row, said, serving

KEY = "sk-planted0123456789abcdef"


def asked(seeds=(1,), prompt=None):
    (question, *_) = (prompt or StepVerdicts(**VERDICTS)).questions(row(["3+5=1"]), 0)
    return Asked(question=question, seeds=tuple(seeds), temperature=0.5, max_tokens=99)


def test_the_request_is_what_the_protocol_asks_for():
    seen = []

    def answer(body, headers):
        seen.append((body, headers))
        return 200, said("fine"), {}

    with serving(answer) as url:
        given = asked(seeds=(5,))
        assert EndpointClient(endpoint(url + "/", served_model="m")).replies([given])[0][0].text == "fine"
    body, headers = seen[0]
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": given.question.text}],
        "temperature": 0.5,
        "max_tokens": 99,
        "seed": 5,
    }
    assert "authorization" not in headers


def test_seeds_are_cut_to_what_every_server_can_read():
    seen = []

    def answer(body, headers):
        seen.append(body["seed"])
        return 200, said("fine"), {}

    with serving(answer) as url:
        EndpointClient(endpoint(url, concurrency=1)).replies([asked(seeds=(2**47 + 5, 2**31 - 1, 2**31))])
    assert seen == [5, 2**31 - 1, 0]


def test_replies_come_in_the_order_of_the_questions_and_no_more_than_the_limit_at_once():
    lock, now, most = threading.Lock(), [0], [0]

    def answer(body, headers):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.02 * (body["seed"] % 3))
        with lock:
            now[0] -= 1
        return 200, said(str(body["seed"])), {}

    with serving(answer) as url:
        client = EndpointClient(endpoint(url, concurrency=3))
        replies = client.replies([asked(seeds=range(at, at + 4)) for at in (0, 10, 20)])
        client.close()
    assert [[reply.text for reply in each] for each in replies] == [
        [str(at + seed) for seed in range(4)] for at in (0, 10, 20)
    ]
    assert most[0] <= 3


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_may_pass_is_tried_again_and_then_given_up(status):
    tries = []

    def answer(body, headers):
        tries.append(time.monotonic())
        return (status, {"error": {}}, {}) if len(tries) < 3 else (200, said("at last"), {})

    with serving(answer) as url:
        assert EndpointClient(endpoint(url, retries=2, backoff_s=0.02)).replies([asked()])[0][0].text == "at last"
        assert tries[1] - tries[0] >= 0.02
        assert tries[2] - tries[1] >= 0.04  # twice as long
        tries.clear()
        assert EndpointClient(endpoint(url, retries=1)).replies([asked()]) == [[None]]
        assert len(tries) == 2


def test_the_server_may_ask_for_a_longer_pause():
    tries = []

    def answer(body, headers):
        tries.append(time.monotonic())
        return (429, {}, {"retry-after": "0.2"}) if len(tries) == 1 else (200, said("x"), {})

    with serving(answer) as url:
        EndpointClient(endpoint(url, retries=1)).replies([asked()])
    assert tries[1] - tries[0] >= 0.2


@pytest.mark.parametrize(
    "answer",
    [
        (400, {"error": {"message": "the prompt is too long"}}),
        (302, {}),
        (200, b"<html>busy</html>"),
        (200, {}),
        (200, {"choices": []}),
        (200, {"choices": [{"message": None, "finish_reason": "stop"}]}),
        (200, []),
    ],
)
def test_an_answer_without_a_reply_is_no_reply_and_not_asked_for_again(answer):
    tries = []

    def answering(body, headers):
        tries.append(1)
        return (*answer, {"location": "http://127.0.0.1:1/"} if answer[0] == 302 else {})

    with serving(answering) as url:
        assert EndpointClient(endpoint(url, retries=3)).replies([asked()]) == [[None]]
    assert len(tries) == 1


def test_a_body_that_cannot_be_unpacked_is_tried_again_and_then_no_reply():
    tries = []

    def answer(body, headers):
        tries.append(1)
        return (200, b"no gzip", {"content-encoding": "gzip"}) if len(tries) < 3 else (200, said("at last"), {})

    with serving(answer) as url:
        assert EndpointClient(endpoint(url, retries=1)).replies([asked()]) == [[None]]
        assert len(tries) == 2
        assert EndpointClient(endpoint(url)).replies([asked()])[0][0].text == "at last"


@pytest.mark.parametrize("content", [said("verdict", finish="length"), said(None)])
def test_a_reply_that_was_cut_is_a_reply_without_text(content):
    with serving(lambda body, headers: (200, content, {})) as url:
        assert EndpointClient(endpoint(url)).replies([asked()])[0][0].text == ""


def test_a_server_that_is_silent_or_gone_costs_no_more_than_the_time_limit():
    def silent(body, headers):
        time.sleep(0.6)
        return 200, said("late"), {}

    with serving(silent) as url:
        began = time.monotonic()
        assert EndpointClient(endpoint(url, timeout_s=0.1)).replies([asked()]) == [[None]]
        assert time.monotonic() - began < 0.5
    assert EndpointClient(endpoint(url, retries=1)).replies([asked()]) == [[None]]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_will_not_pass_ends_the_run_without_repeating_the_key(status, monkeypatch, caplog):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    seen = []

    def answer(body, headers):
        seen.append(headers["authorization"])
        return status, {"error": {"message": f"Incorrect API key provided: {KEY}"}}, {}

    caplog.set_level(logging.DEBUG)
    with serving(answer) as url:
        client = EndpointClient(endpoint(url, api_key_variable="JUDGE_KEY", retries=3))
        with pytest.raises(ConfigError, match=f"HTTP {status}") as failed:
            client.replies([asked(), asked()])
    assert seen[0] == f"Bearer {KEY}"
    assert KEY not in str(failed.value)
    assert KEY not in caplog.text
    assert KEY not in repr(client) + repr(endpoint(url, api_key_variable="JUDGE_KEY"))


def test_the_key_is_read_from_the_environment_and_nowhere_else(monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ConfigError, match="variable JUDGE_KEY"):
        endpoint(api_key_variable="JUDGE_KEY").connect(context())
    with pytest.raises(ConfigError, match="never the key itself") as failed:
        endpoint(api_key_variable=KEY).check(None)
    assert KEY not in str(failed.value)


def test_no_proxy_of_the_environment_sees_the_prompts(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with serving(lambda body, headers: (200, said("direct"), {})) as url:
        assert EndpointClient(endpoint(url)).replies([asked()])[0][0].text == "direct"


@pytest.mark.parametrize(
    "url",
    ["https://judge.example/v1", "http://localhost:1/v1", "http://127.8.9.1:1/v1", "http://[::1]:80/v1"],
)
def test_addresses_that_are_taken(url):
    endpoint(url).check(None)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (None, "neither an endpoint nor a model"),
        ("judge.example/v1", "expected https"),
        ("ftp://judge.example/v1", "expected https"),
        ("http:///v1", "expected https"),
        ("http://10.0.0.7:8000/v1", "plain http to another machine"),
        ("http://localhost.example/v1", "plain http to another machine"),
        (f"https://me:{KEY}@judge.example/v1", "a user name, a password"),
        (f"https://judge.example/v1?key={KEY}", "a query"),
        ("http://127.0.0.1:99999/v1", "cannot be read"),
    ],
)
def test_addresses_that_are_refused(url, message):
    with pytest.raises(ConfigError, match=message) as failed:
        endpoint(url).check(None)
    assert KEY not in str(failed.value)


def test_other_settings_that_cannot_be():
    endpoint("http://10.0.0.7:8000/v1", allow_plain_http=True).check(None)
    with pytest.raises(ConfigError, match="has an endpoint and the model"):
        endpoint().check("folder")
    for change in ({"concurrency": 0}, {"timeout_s": 0.0}, {"retries": -1}, {"backoff_s": -1.0}, {"top_logprobs": 1}):
        with pytest.raises(ConfigError, match=next(iter(change))):
            endpoint(**change).check(None)


# -- the probability of a verdict ------------------------------------------------------------------------------------


def tokens_of(text, top):
    """Three tokens, the verdict's word the last, with these alternatives."""
    head, word = text.rsplit(" ", 1)
    logprobs = [{"token": each, "logprob": 0.0, "top_logprobs": []} for each in (head[:3], head[3:])]
    return [*logprobs, {"token": f" {word}", "logprob": 0.0, "top_logprobs": top}]


@pytest.mark.parametrize(
    ("top", "expected"),
    [
        ([(" yes", 0.6), (" no", 0.2)], 0.75),  # 0.6 / 0.8
        ([(" no", 0.5), (" Yes", 0.1), ("yes", 0.1), (" NO", 0.3)], 0.2),  # spellings count together: 0.2 / 1.0
        ([(" yes", 0.9), (" maybe", 0.06), (" well", 0.04)], 0.9 / 0.94),  # `no` as likely as the least likely
        ([(" no", 0.9), (" hm", 0.1)], 0.1),
        ([(" right", 0.9), (" wrong", 0.1)], None),  # neither word: nothing to compare
        ([], None),
    ],
)
def test_probability_from_the_alternatives_at_the_verdict(top, expected):
    given = asked(prompt=OneStepProbability(instructions="Is it?", gold=False))
    text = f"verdict {given.question.marker}: yes"
    alternatives = [{"token": token, "logprob": math.log(p)} for token, p in top]
    seen = []

    def answer(body, headers):
        seen.append(body)
        return 200, said(text, logprobs=tokens_of(text, alternatives)), {}

    with serving(answer) as url:
        (reply,) = EndpointClient(endpoint(url, top_logprobs=7)).replies([given])[0]
    assert (seen[0]["logprobs"], seen[0]["top_logprobs"]) == (True, 7)
    assert reply.probability == (None if expected is None else pytest.approx(expected))


YES_OR_NO = [{"token": token, "logprob": math.log(p)} for token, p in ((" yes", 0.6), (" no", 0.2))]


def plain_tokens(*texts):
    """Tokens before or after the verdict; were one of them taken for it, the probability would be another."""
    top = [{"token": " yes", "logprob": math.log(0.1)}, {"token": " no", "logprob": math.log(0.9)}]
    return [{"token": each, "logprob": 0.0, "top_logprobs": top} for each in texts]


@pytest.mark.parametrize(
    ("before", "head", "after"),
    [
        # U+2203 is three bytes, one token each, which the server spells as bytes: 30 characters for one
        (("bytes:\\xe2", "bytes:\\x88", "bytes:\\x83", "x\n"), "\u2203x\n", ()),
        (("<think>", "Is it no or yes?", " yes", "</think>"), "", ()),  # reasoning that the server keeps apart
        (("Fine.", "\n"), "Fine.\n", ("<|im_end|>",)),  # the token that ended the reply
        (("Fine.", "\n"), "Fine.\n", ("",)),  # the same, from a server that spells it as nothing
        (("Fine.", "\n"), "\n Fine.\n", ("\n", "\n\n", "<|im_end|>")),  # space at either end cut or added
    ],
)
def test_the_verdicts_token_is_found_though_others_are_no_part_of_the_text(before, head, after):
    given = asked(prompt=OneStepProbability(instructions="Is it?", gold=False))
    line = f"verdict {given.question.marker}: yes"
    tokens = [*plain_tokens(*before), *tokens_of(line, YES_OR_NO), *plain_tokens(*after)]
    with serving(lambda body, headers: (200, said(head + line, logprobs=tokens), {})) as url:
        (reply,) = EndpointClient(endpoint(url)).replies([given])[0]
    assert reply.probability == pytest.approx(0.75)  # 0.6 / (0.6 + 0.2)


@pytest.mark.parametrize("after", [(" or", " no"), (" no", "<|im_end|>"), ("bytes:\\xe2", "bytes:\\x88")])
def test_tokens_that_do_not_end_as_the_text_does_give_no_probability(after):
    given = asked(prompt=OneStepProbability(instructions="Is it?", gold=False))
    line = f"verdict {given.question.marker}: yes"
    tokens = [*tokens_of(line, YES_OR_NO), *plain_tokens(*after)]
    with serving(lambda body, headers: (200, said(line, logprobs=tokens), {})) as url:
        (reply,) = EndpointClient(endpoint(url)).replies([given])[0]
    assert reply.text == line
    assert reply.probability is None


def test_a_verdict_with_decoration_after_it_keeps_its_token():
    given = asked(prompt=OneStepProbability(instructions="Is it?", gold=False))
    line = f"**verdict {given.question.marker}: yes"
    tokens = [*tokens_of(line, YES_OR_NO), *plain_tokens(".**", "\n")]
    with serving(lambda body, headers: (200, said(f"{line}.**\n", logprobs=tokens), {})) as url:
        (reply,) = EndpointClient(endpoint(url)).replies([given])[0]
    assert reply.probability == pytest.approx(0.75)


@pytest.mark.parametrize("logprobs", [None, [], [{"token": "verdict"}]])
def test_a_server_without_logprobs_gives_no_probability(logprobs):
    given = asked(prompt=OneStepProbability(instructions="Is it?", gold=False))
    text = f"verdict {given.question.marker}: yes"
    with serving(lambda body, headers: (200, said(text, logprobs=logprobs), {})) as url:
        (reply,) = EndpointClient(endpoint(url)).replies([given])[0]
    assert reply is None or reply.probability is None
