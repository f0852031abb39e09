"""Rows, judges and a server for tests of the generative judge."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rlprm.roles import Prompt, RowText
from rlprm.sources.judge import GenerativeJudge
from rlprm.sources.judge_endpoint import Endpoint
from rlprm.sources.judge_prompts import StepVerdicts
from rlprm.sources.judge_server import ChainJudge

VERDICTS = {"instructions": "Judge each step.", "gold": False, "overall": False}


def row(steps: Sequence[str], *, question: str = "3+5*2\n", gold: str = "2 mod 7") -> RowText:
    prompt = Prompt(id="a/0", text=question, question=question, tokens=(1,), gold=gold, source="a")
    return RowText(prompt=prompt, response="".join(steps), steps=tuple(steps))


def endpoint(url: str | None = "http://127.0.0.1:1/v1", **changes: Any) -> Endpoint:
    settings: dict[str, Any] = {
        "url": url,
        "served_model": "judge",
        "api_key_variable": None,
        "allow_plain_http": False,
        "concurrency": 4,
        "timeout_s": 5.0,
        "retries": 0,
        "backoff_s": 0.0,
        "top_logprobs": 20,
    }
    return Endpoint(**{**settings, **changes})


def settings(**changes: Any) -> dict[str, Any]:
    """A judge's settings: one greedy vote on every step."""
    given: dict[str, Any] = {
        "judgement": StepVerdicts(**VERDICTS),
        "client": endpoint(),
        "votes": 1,
        "rule": "single",
        "pays": "step",
        "where": "step_end",
        "right": 1.0,
        "wrong": 0.0,
        "temperature": 0.0,
        "max_tokens": 512,
        "max_absent": 1.0,
    }
    return {**given, **changes}


def judge(context: Any, url: str, **changes: Any) -> GenerativeJudge:
    return GenerativeJudge(context, **settings(client=endpoint(url), **changes))


def chain_judge(**changes: Any) -> ChainJudge:
    given = {"modulus": 7, "error_rate": 0.0, "unparsable_rate": 0.0, "delay_s": 0.0, "seed": 0}
    return ChainJudge(**{**given, **changes})


@contextmanager
def serving(answer: Callable[[dict[str, Any], dict[str, str]], tuple[int, Any, dict[str, str]]]) -> Iterator[str]:
    """A server whose every answer is ``answer(body, headers) -> (status, content, headers)``; yields its url."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            status, content, headers = answer(body, {key.lower(): value for key, value in self.headers.items()})
            payload = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(payload))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def said(text: str, *, finish: str = "stop", logprobs: Any = None) -> dict[str, Any]:
    """A chat completion that says ``text``."""
    choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return {"choices": [choice if logprobs is None else {**choice, "logprobs": {"content": logprobs}}]}
