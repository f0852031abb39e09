"""A judge for the embedded task, as a server: what a large model does elsewhere, on a laptop and without one.

It speaks the chat-completions protocol on loopback, reads the same prompt as any judge, works chain-arithmetic solutions
out with the task's own checker, and answers with a short critique and the verdict line. Like a real judge it can be wrong,
unreadable and slow, each at a rate of one's choice, so judge methods can be tried and their failures be watched::

    python -m rlprm.sources.judge_server --port 8765 --error-rate 0.1
    rlprm train recipe=chain_arithmetic_cpu method=capo streams.process.source.kind.client.url=http://127.0.0.1:8765/v1
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rlprm.data.tasks.chain_arithmetic import parse, verify
from rlprm.errors import ConfigError, DataError
from rlprm.sources.judge_parsing import OVERALL, RIGHT_OR_WRONG, YES_OR_NO, Form, Points, form_of

LOOPBACK = "127.0.0.1"
NAME = "chain-arithmetic-judge"
CONFIDENCE = 0.95  # probability of the word that it says, where probabilities are asked for
POLL_S = 0.05  # how soon it notices that it is to end
LARGEST_REQUEST = 4 << 20  # bytes
_PIECES = re.compile(r"\s*\S+|\s+")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainJudge:
    """Reads a judge's prompt on a chain-arithmetic solution and replies.

    >>> from rlprm.roles import Prompt, RowText
    >>> from rlprm.sources.judge_prompts import StepVerdicts
    >>> prompt = Prompt(id="a/0", text="3+5*2\\n", question="3+5*2\\n", tokens=(1,), gold="2 mod 7", source="a")
    >>> row = RowText(prompt=prompt, response="3+5=1\\n1*2=4", steps=("3+5=1\\n", "1*2=4"))
    >>> (question,) = StepVerdicts(instructions="Judge.", gold=False, overall=True).questions(row, 0)
    >>> judge = ChainJudge(modulus=7, error_rate=0.0, unparsable_rate=0.0, delay_s=0.0, seed=0)
    >>> question.form.read(question.marker, judge.reply(question.text, 1))
    (1.0, 0.0, 0.0)
    """

    modulus: int
    error_rate: float  # entries of a verdict that it gets wrong
    unparsable_rate: float  # replies without a verdict line that could be read
    delay_s: float  # before each reply
    seed: int

    def __post_init__(self) -> None:
        for name in ("error_rate", "unparsable_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a fraction from 0 to 1")
        if self.delay_s < 0 or self.modulus < 3:
            raise ConfigError(
                f"delay_s is {self.delay_s} and modulus {self.modulus}; expected 0 or more, and the task's prime"
            )

    def reply(self, text: str, seed: int) -> str:
        """A critique, and the line that the prompt asks for; the same for the same text and seed.

        Raises:
            DataError: the text is no judge's prompt on a chain-arithmetic solution.
        """
        rng = random.Random(f"{self.seed}/{seed}/{text}")
        marker, form = _required(form_of(text.rstrip().rsplit("\n", 1)[-1]))
        steps = [_block(text, f"step {number + 1}", marker) for number in range(_count(text, marker))]
        labels, outcome = self._checked(_block(text, "question", marker), steps)
        critique = [f"Step {at + 1}, {step.strip()!r}: {'fine' if label else 'a mistake'}." for at, (step, label) in
                    enumerate(zip(steps, labels, strict=True))]  # fmt: skip
        if rng.random() < self.unparsable_rate:
            return "\n".join([*critique, rng.choice(["I cannot tell.", f"verdict {marker}: maybe", "verdict: right"])])
        words = [self._word(form, name, labels, outcome, rng) for name in form.names]
        return "\n".join([*critique, form.filled(marker, words)])

    def _checked(self, question: str, steps: Sequence[str]) -> tuple[list[bool], bool]:
        """Is each step right, and the answer? A step after a malformed line, whose value nobody knows, is not."""
        expression = question.strip() + "\n"
        lines = [step.strip("\n").split("\n") for step in steps]
        outcome, _, labels = verify(
            parse(expression, self.modulus).gold, "\n".join(line for each in lines for line in each), expression
        )
        remaining = iter(labels)
        return [min(next(remaining, 0) for _ in each) == 1 for each in lines], outcome == 1

    def _word(self, form: Form, name: str, labels: Sequence[bool], outcome: bool, rng: random.Random) -> str:
        mistaken = rng.random() < self.error_rate
        if form.values == RIGHT_OR_WRONG:
            right = outcome if name in (OVERALL, "") else labels[int(name) - 1]
            return "right" if right != mistaken else "wrong"
        if form.values == YES_OR_NO:
            return "yes" if labels[-1] != mistaken else "no"
        share = float(labels[int(name) - 1]) if name else sum(labels) / len(labels)
        share = 1 - share if mistaken else share
        if isinstance(form.values, Points):
            return str(round(form.values.low + share * (form.values.high - form.values.low)))
        return f"{share:.2f}"


class JudgeServer:
    """The judge on a loopback port while the context is open; port 0 takes a free one."""

    def __init__(self, judge: ChainJudge, port: int) -> None:
        self._server = _Server(judge, port)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(POLL_S,), daemon=True)

    @property
    def url(self) -> str:
        """What a judge's client is given."""
        return f"http://{LOOPBACK}:{self._server.server_address[1]}/v1"

    @property
    def answered(self) -> int:
        """Requests answered so far."""
        return self._server.answered

    def __enter__(self) -> JudgeServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, judge: ChainJudge, port: int) -> None:
        super().__init__((LOOPBACK, port), _Handler)
        self.judge = judge
        self._lock = threading.Lock()
        self.answered = 0

    def count(self) -> None:
        with self._lock:
            self.answered += 1


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        known = self.path.rstrip("/") == "/v1/models"
        self._answer(
            200 if known else 404, {"object": "list", "data": [{"id": NAME, "object": "model"}]} if known else {}
        )

    def do_POST(self) -> None:
        size = self.headers.get("content-length", "")
        if self.path != "/v1/chat/completions" or not size.isdigit() or int(size) > LARGEST_REQUEST:
            self.close_connection = True  # the body was not read
            self._answer(
                404 if self.path != "/v1/chat/completions" else 413, {"error": {"message": "no such address or size"}}
            )
            return
        try:
            body = json.loads(self.rfile.read(int(size)))
            text = "\n".join(message["content"] for message in body["messages"])
            reply = self.server.judge.reply(text, int(body.get("seed") or 0))
        except (ValueError, KeyError, TypeError, AttributeError, DataError) as error:
            self._answer(400, {"error": {"message": f"not a request that this judge understands: {error}"}})
            return
        time.sleep(self.server.judge.delay_s)
        self.server.count()
        self._answer(200, completion(reply, max_tokens=body.get("max_tokens"), logprobs=bool(body.get("logprobs"))))

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: one line a request would bury everything else."""

    def _answer(self, status: int, content: Any) -> None:
        payload = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)


def completion(reply: str, *, max_tokens: int | None, logprobs: bool) -> dict[str, Any]:
    """The protocol's answer; its tokens are the words of the reply, so that a limit and log-probs mean something.

    >>> completion("so right", max_tokens=1, logprobs=False)["choices"][0]["finish_reason"]
    'length'
    """
    pieces = _PIECES.findall(reply)
    kept = pieces[:max_tokens]
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": "".join(kept)},
        "finish_reason": "stop" if len(kept) == len(pieces) else "length",
    }
    if logprobs:
        choice["logprobs"] = {"content": [_alternatives(piece) for piece in kept]}
    return {"object": "chat.completion", "model": NAME, "choices": [choice]}


def _alternatives(piece: str) -> dict[str, Any]:
    """A token with its log-prob; a verdict's word with the other word beside it."""
    other = {"yes": "no", "no": "yes"}.get(piece.strip())
    if other is None:
        return {"token": piece, "logprob": 0.0, "top_logprobs": [{"token": piece, "logprob": 0.0}]}
    both = [(piece, math.log(CONFIDENCE)), (piece.replace(piece.strip(), other), math.log(1 - CONFIDENCE))]
    top = [{"token": token, "logprob": logprob} for token, logprob in both]
    return {**top[0], "top_logprobs": top}


def _required(found: tuple[str, Form] | None) -> tuple[str, Form]:
    if found is None:
        raise DataError(
            "the last line of the prompt asks for no verdict line; this judge reads the prompts of judge_prompts"
        )
    return found


def _count(text: str, marker: str) -> int:
    return len(re.findall(rf"^<step \d+ {re.escape(marker)}>$", text, re.MULTILINE))


def _block(text: str, name: str, marker: str) -> str:
    """What stands between a pair of tags."""
    tag = f"{name} {re.escape(marker)}"
    found = re.search(rf"^<{tag}>\n(.*?)\n</{tag}>$", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise DataError(f"the prompt has no block {name!r}")
    return found[1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m rlprm.sources.judge_server", description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, default=8765, help="port on loopback; 0: a free one (default 8765)")
    parser.add_argument("--modulus", type=int, default=7, help="the task's modulus (default 7)")
    parser.add_argument("--error-rate", type=float, default=0.0, help="fraction of wrong verdicts (default 0)")
    parser.add_argument(
        "--unparsable-rate", type=float, default=0.0, help="fraction of replies without a verdict (default 0)"
    )
    parser.add_argument("--delay-s", type=float, default=0.0, help="seconds before each reply (default 0)")
    parser.add_argument("--seed", type=int, default=0, help="seed of its mistakes (default 0)")
    given = vars(parser.parse_args(arguments))
    port = given.pop("port")
    with JudgeServer(ChainJudge(**given), port) as server:
        print(f"judging at {server.url} (model {NAME}); Ctrl-C ends it", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("stopped", flush=True)


if __name__ == "__main__":
    main()
