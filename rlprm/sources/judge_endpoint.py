"""A judge that is a server: any that speaks the chat-completions protocol."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import ip_address
from time import sleep
from typing import Any
from urllib.parse import urlsplit

import httpx

from rlprm.errors import ConfigError
from rlprm.sources.base import SourceContext
from rlprm.sources.judge_clients import Asked, Client, preference
from rlprm.sources.judge_prompts import Question, Reply

FATAL = {401: "refused the key", 403: "refused the key", 404: "knows no such address or model"}
PASSING = {408, 409, 425, 429, 500, 502, 503, 504}
LONGEST_PAUSE_S = 60.0
SEED_RANGE = 2**31  # some servers read a seed as a signed 32-bit number; two questions may share one without harm
SMALLEST_PROBABILITY = math.log(1e-30)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Any server with ``POST url/chat/completions``: vLLM, SGLang, llama.cpp, a provider, or a small one of one's own.

    The key is read from the environment variable named here, on every machine that asks; it stands in no file and no
    message. Plain http carries it, and the data, in the open: only to this machine, unless allowed. Proxies and netrc are
    not used, so that nothing leaves by a way that nobody configured.
    """

    url: str | None  # up to and with /v1
    served_model: str  # the model's name at the server
    api_key_variable: str | None  # NAME of the environment variable; null: no key
    allow_plain_http: bool
    concurrency: int  # requests of one rank at a time
    timeout_s: float  # longest silence of the server during one request
    retries: int  # after a failure that may pass
    backoff_s: float  # pause before the first retry; doubles each time
    top_logprobs: int  # alternatives asked for where a verdict's probability is wanted

    def check(self, model: str | None) -> None:
        """Refuse what cannot be reached or would give something away.

        Raises:
            ConfigError: no address and no model, both of them, or an address, a variable or a limit that cannot be.
        """
        if self.url is None:
            raise ConfigError(
                "the judge has neither an endpoint nor a model, so nobody would judge; set client.url to an address such as "
                "http://127.0.0.1:8000/v1, or choose client `engines` and set the source's model to a folder"
            )
        if model is not None:
            raise ConfigError(
                f"the judge has an endpoint and the model {model}; set model to null, or choose client `engines`"
            )
        _check_address(self.url, self.allow_plain_http)
        if self.api_key_variable is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_variable):
            # What was given is not repeated: it may be the key itself.
            raise ConfigError(
                "api_key_variable is no name of an environment variable; give its name, never the key itself"
            )
        if self.concurrency < 1 or self.timeout_s <= 0 or self.retries < 0 or self.backoff_s < 0:
            raise ConfigError(
                f"concurrency {self.concurrency}, timeout_s {self.timeout_s}, retries {self.retries}, backoff_s "
                f"{self.backoff_s}; expected at least 1, more than 0, and 0 or more for the last two"
            )
        if not 2 <= self.top_logprobs <= 20:
            raise ConfigError(f"top_logprobs is {self.top_logprobs}; expected 2 to 20, the protocol's most")

    def connect(self, context: SourceContext) -> Client:
        """A client of the server.

        Raises:
            ConfigError: the environment variable for the key is not set on this machine.
        """
        return EndpointClient(self)


class EndpointClient:
    """Requests over HTTP, a bounded number at a time; what fails for good is a reply that is not there."""

    def __init__(self, endpoint: Endpoint) -> None:
        assert endpoint.url is not None
        self._endpoint = endpoint
        self._address = f"{endpoint.url.rstrip('/')}/chat/completions"
        self._http = httpx.Client(
            headers=_key_header(endpoint.api_key_variable),
            timeout=endpoint.timeout_s,
            limits=httpx.Limits(max_connections=endpoint.concurrency),
            follow_redirects=False,
            trust_env=False,
        )

    def replies(self, asked: Sequence[Asked]) -> list[list[Reply | None]]:
        """All replies.

        Raises:
            ConfigError: the server refuses every request for a reason that will not pass: key, address or model.
        """
        with ThreadPoolExecutor(self._endpoint.concurrency) as pool:
            waiting = [[pool.submit(self._reply, each, seed) for seed in each.seeds] for each in asked]
            try:
                return [[future.result() for future in futures] for futures in waiting]
            except ConfigError:
                pool.shutdown(cancel_futures=True)
                raise

    def close(self) -> None:
        self._http.close()

    def _reply(self, asked: Asked, seed: int) -> Reply | None:
        body: dict[str, Any] = {
            "model": self._endpoint.served_model,
            "messages": [{"role": "user", "content": asked.question.text}],
            "temperature": asked.temperature,
            "max_tokens": asked.max_tokens,
            "seed": seed % SEED_RANGE,
        }
        if asked.question.words is not None:
            body |= {"logprobs": True, "top_logprobs": self._endpoint.top_logprobs}
        answer = self._posted(body)
        return None if answer is None else _read_choice(answer, asked.question)

    def _posted(self, body: dict[str, Any]) -> Any:
        """The server's answer as JSON; None where there is none."""
        for attempt in range(self._endpoint.retries + 1):
            pause = self._endpoint.backoff_s * 2**attempt
            try:
                response = self._http.post(self._address, json=body)
            except (httpx.TransportError, httpx.DecodingError):  # no answer, or a body that cannot be unpacked
                response = None
            if response is not None and response.status_code in FATAL:
                # The body is not repeated: servers quote a part of the key in it.
                raise ConfigError(
                    f"the judge at {self._endpoint.url} {FATAL[response.status_code]} (HTTP {response.status_code}); check "
                    f"url, served_model ({self._endpoint.served_model}) and the variable named by api_key_variable"
                )
            if response is not None and response.status_code not in PASSING:
                return _json(response) if response.is_success else None
            if response is not None:
                pause = max(pause, _retry_after(response))
            if attempt < self._endpoint.retries:
                sleep(min(pause, LONGEST_PAUSE_S))
        return None


def _check_address(url: str, allow_plain_http: bool) -> None:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"the judge's url cannot be read ({error}); expected https://HOST/v1") from None
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        # Not repeated: this is where people put keys.
        raise ConfigError(
            "the judge's url has a user name, a password, a query or a fragment; give the bare address, and the key by "
            "api_key_variable"
        )
    if parts.scheme not in ("http", "https") or not host:
        raise ConfigError(f"the judge's url is {url!r}; expected https://HOST/v1 or http://127.0.0.1:PORT/v1")
    if parts.scheme == "http" and not _is_loopback(host) and not allow_plain_http:
        raise ConfigError(
            f"the judge's url {url} is plain http to another machine, where everyone on the way reads prompts and key; use "
            "https, or set allow_plain_http to true in a network that you trust"
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _key_header(variable: str | None) -> dict[str, str]:
    if variable is None:
        return {}
    key = os.environ.get(variable, "")
    if not key:
        raise ConfigError(
            f"the environment variable {variable}, named by api_key_variable, is not set on this machine; export it there, or "
            "set api_key_variable to null"
        )
    return {"Authorization": f"Bearer {key}"}


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except (ValueError, RecursionError):  # no JSON, or nested beyond reason
        return None


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the server asks for; 0 where it does not say, or says it as a date."""
    said = response.headers.get("retry-after", "")
    return float(said) if re.fullmatch(r"\d{1,6}(\.\d{1,3})?", said) else 0.0


def _read_choice(answer: Any, question: Question) -> Reply | None:
    """The first choice of a chat completion; without text where it was cut, None where there is none."""
    try:
        choice = answer["choices"][0]
        text, finish = choice["message"]["content"], choice["finish_reason"]
        pieces = (choice.get("logprobs") or {}).get("content") or []
        if not isinstance(text, str) or finish != "stop":
            return Reply(text="")
        return Reply(text=text, probability=_probability(pieces, text, question))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError):
        return None


def _probability(pieces: Sequence[Any], text: str, question: Question) -> float | None:
    """From the alternatives returned at the verdict's token; a word that is not among them counts as the least likely.

    Spellings of a word (`` yes``, ``Yes``) count together. None: no verdict, its token is not to be found, or neither
    word is among the alternatives.
    """
    span = None if question.words is None else question.form.span(question.marker, text)
    if span is None or question.words is None:
        return None
    piece = _piece_at(pieces, text[span[0] :].rstrip())
    if piece is None:
        return None
    found = [(each["token"].strip().casefold(), float(each["logprob"])) for each in piece["top_logprobs"]]
    likely = [[logprob for token, logprob in found if token == word] for word in question.words]
    if not any(likely):
        return None
    smallest = min(logprob for _, logprob in found)
    first, second = (
        math.log(sum(math.exp(max(each, SMALLEST_PROBABILITY)) for each in logprobs)) if logprobs else smallest
        for logprobs in likely
    )
    return preference(first, second)


def _piece_at(pieces: Sequence[Any], tail: str) -> Any | None:
    """The token with which ``tail``, the end of the reply, begins; None where the tokens do not end with it.

    Counted from the end, because tokens before it may have other texts than the reply: a part of a character is spelled
    as bytes, and reasoning may be among the tokens and not in the reply.
    """
    for kept in (pieces, pieces[:-1]):  # many servers list the token that ends a reply, which is no part of its text
        found = ""
        for piece in reversed(kept):
            found = (piece["token"] + found).rstrip()
            if len(found) >= len(tail):
                if found.endswith(tail):
                    return piece
                break
    return None
