"""The jobs API of a Ray cluster that runs already: submit, look, read, stop."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from rlprm.errors import ConfigError

CONNECT_S = 5.0
CALL_S = 60.0  # longest wait for one answer; an upload may take as long again for every part of it


class Unreachable(Exception):
    """No answer now; the job may well go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """What the cluster says of a job."""

    state: str  # PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED; "" when it does not know the job
    message: str
    code: int | None  # of its entrypoint


class Jobs:
    """Jobs of one cluster, by its dashboard's address.

    Raises:
        ConfigError: nothing answers there, it wants another token, or its Ray is too old.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        _require_answer(address)
        for name in ("ray", "ray.dashboard.modules.dashboard_sdk"):
            logging.getLogger(name).setLevel(logging.ERROR)  # otherwise they tell of each file that they do not send
        try:
            self._client = _Client(address)
        except AuthenticationError as error:
            raise ConfigError(
                f"the Ray cluster at {address} wants a token ({_first_line(error)}); export RAY_AUTH_MODE=token and "
                "RAY_AUTH_TOKEN with the cluster's own, or put it into ~/.ray/auth_token"
            ) from error
        except (ConnectionError, RuntimeError, ValueError, requests.RequestException) as error:
            raise ConfigError(
                f"no Ray jobs API at {address} ({_first_line(error)}); give the dashboard's address"
            ) from error

    def submit(
        self,
        name: str,
        entrypoint: str,
        *,
        environment: Mapping[str, str],
        directory: str | None = None,
        excludes: Sequence[str] = (),
    ) -> None:
        """Start ``entrypoint`` on the head, with ``directory`` sent there as its folder.

        Raises:
            ConfigError: the cluster refuses it, or the folder is too large.
            Unreachable: no answer now; it may have been accepted.
        """
        runtime: dict[str, Any] = {"env_vars": dict(environment)}
        if directory is not None:
            runtime |= {"working_dir": directory, "excludes": list(excludes)}
        try:
            self._client.submit_job(entrypoint=entrypoint, submission_id=name, runtime_env=runtime)
        except requests.RequestException as error:
            raise Unreachable(f"the Ray cluster at {self._address} gave no answer ({_first_line(error)})") from error
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"the Ray cluster at {self._address} refuses the job: {_first_line(error)}") from error

    def look(self, name: str) -> JobState:
        """How a job stands.

        Raises:
            Unreachable: no answer now.
        """
        answer = self._get(f"/api/jobs/{name}")
        if answer.status_code == 404:
            return JobState(state="", message="", code=None)
        found = answer.json()
        return JobState(
            state=str(found["status"]), message=str(found.get("message") or ""), code=found.get("driver_exit_code")
        )

    def text(self, name: str) -> str:
        """All that a job has printed so far.

        Raises:
            Unreachable: no answer now.
        """
        answer = self._get(f"/api/jobs/{name}/logs")
        return "" if answer.status_code == 404 else str(json.loads(answer.text)["logs"])

    def stop(self, name: str) -> None:
        """End a job hard: Ray kills it a few seconds after a first signal.

        Raises:
            Unreachable: no answer now.
        """
        try:
            self._client.stop_job(name)
        except (RuntimeError, requests.RequestException) as error:
            raise Unreachable(_first_line(error)) from error

    def _get(self, path: str) -> requests.Response:
        try:
            answer = self._client._do_request("GET", path)
        except (AuthenticationError, requests.RequestException) as error:
            raise Unreachable(_first_line(error)) from error
        if answer.status_code not in (200, 404):
            raise Unreachable(f"status {answer.status_code}: {answer.text[:200]}")
        return answer


class _Client(JobSubmissionClient):
    """Ray's own, which by itself waits for an answer for ever."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        return super()._do_request(method, endpoint, timeout=(CONNECT_S, CALL_S), **options)


def _require_answer(address: str) -> None:
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or parts.hostname is None:
        raise ConfigError(
            f"cluster.address is {address!r}; expected the dashboard's, for example http://127.0.0.1:8265"
        )
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname, port), timeout=CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no Ray cluster answers at cluster.address {address} ({error}); start one with its dashboard, or open a tunnel "
            "(ssh -L 8265:127.0.0.1:8265 HEAD)"
        ) from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
