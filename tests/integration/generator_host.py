"""Runs a generator in a process of its own (vLLM changes the process it is imported in), and what the tests ask of it.

``Host`` starts this file as a script; each call names a function below, which runs in the child with the generator.
"""

from __future__ import annotations

import importlib
import os
import pickle
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

ROOT = Path(__file__).parents[2]


class Host:
    """A child process with one generator; ``host.call(command, *args)`` returns its result or raises its error."""

    def __init__(self, environment: dict[str, str]) -> None:
        read, write = os.pipe()
        self._child = subprocess.Popen(
            [sys.executable, __file__, str(write)],
            stdin=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
            pass_fds=[write],
        )
        os.close(write)
        self._answers = os.fdopen(read, "rb")
        self._current: tuple[str, str] | None = None

    def start(self, kind: str, model_path: str, settings: dict[str, Any]) -> float:
        """Build a generator (after closing the one before); seconds it took."""
        self._current = None
        seconds = self.call("start", kind, model_path, settings)
        self._current = (kind, model_path)
        return seconds

    def use(self, kind: str, model_path: str, settings: dict[str, Any]) -> None:
        """Build a generator unless it is there already."""
        if self._current != (kind, model_path):
            self.start(kind, model_path, settings)

    def forget(self) -> None:
        """The present generator is of no more use."""
        self._current = None

    def post(self, name: str, *args: Any) -> None:
        """Ask without waiting; :meth:`answer` waits."""
        assert self._child.stdin is not None
        _put(self._child.stdin, (name, args))

    def answer(self) -> Any:
        """The result of the oldest question that has not been answered."""
        good, value = _get(self._answers)
        if not good:
            raise value
        return value

    def call(self, name: str, *args: Any) -> Any:
        """Ask and wait."""
        self.post(name, *args)
        return self.answer()

    def close(self) -> None:
        """End the child; it must go by itself."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        assert self._child.wait(timeout=60) == 0
        self._answers.close()


KINDS = {
    "hf": ("rlprm.engine.generator_hf", "HfGenerator", "HfSettings"),
    "vllm": ("rlprm.engine.generator_vllm", "VllmGenerator", "VllmSettings"),
    "async": ("rlprm.engine.vllm_async", "VllmAsyncGenerator", "VllmSettings"),
}


class Commands:
    """What a test may ask; runs in the child."""

    def __init__(self) -> None:
        self.generator: Any = None

    def start(self, kind: str, model_path: str, settings: dict[str, Any]) -> float:
        if self.generator is not None:
            self.generator.close()
            self.generator = None
        module_name, engine, settings_class = KINDS[kind]
        module = importlib.import_module(module_name)
        start = time.perf_counter()
        self.generator = getattr(module, engine)(model_path, getattr(module, settings_class)(**settings))
        return time.perf_counter() - start

    def generate(self, requests: list[Any]) -> list[Any]:
        return list(self.generator.generate(requests))

    def timed_generate(self, requests: list[Any]) -> tuple[float, list[Any]]:
        start = time.perf_counter()
        rollouts = self.generate(requests)
        return time.perf_counter() - start, rollouts

    def logprobs(self, tokens: list[list[int]], temperature: float) -> list[list[float]]:
        return self.generator.logprobs(tokens, temperature)

    def load(self, version: int, weights: list[tuple[str, Any]]) -> str:
        return self.generator.load(version, iter(weights))

    def timed_load(self, version: int, weights: list[tuple[str, Any]]) -> float:
        start = time.perf_counter()
        self.load(version, weights)
        return time.perf_counter() - start

    def load_buckets(self, version: int, manifest: Any, packed: list[Any]) -> str:
        for bucket in packed:
            bucket.flags.writeable = False  # as arrays from an object store are
        return self.generator.load_buckets(version, manifest, packed)

    def join_group(self, *args: Any) -> int:
        self.generator.join_group(*args)
        return self.generator.group_ranks

    def load_group(self, *args: Any) -> str:
        return self.generator.load_group(*args)

    def version(self) -> int:
        return self.generator.version

    def load_without_repack(self, version: int, weights: list[tuple[str, Any]]) -> str:
        from rlprm.engine import vllm_worker

        repack, vllm_worker.repack_tied = vllm_worker.repack_tied, lambda model: None
        try:
            return self.load(version, weights)
        finally:
            vllm_worker.repack_tied = repack

    def load_without_cache_reset(self, version: int, weights: list[tuple[str, Any]]) -> str:
        self.generator._reset_prefix_cache = lambda: True
        try:
            return self.load(version, weights)
        finally:
            del self.generator._reset_prefix_cache

    def load_broken_off(self, version: int, weights: list[tuple[str, Any]], part: float = 1.0) -> str:
        """The first ``part`` of the buckets, and at best all but one: the reload fails on the way."""
        from rlprm.engine.weights import Manifest, buckets

        packed = list(buckets(weights, 4096))
        return self.generator.load_buckets(version, Manifest.of(weights), packed[: int(part * (len(packed) - 1))])

    def mend(self) -> bool:
        return self.generator.mend()

    def load_while_running(self, version: int, weights: list[tuple[str, Any]], requests: list[Any]) -> list[Any]:
        """The error of a load between two responses, and what the iterator still gives."""
        running = self.generator.generate(requests)
        first = next(running)
        try:
            self.load(version, weights)
        except RuntimeError as error:
            return [str(error), first, *running]
        return []

    def plays_the_role(self) -> bool:
        from rlprm.roles import Generator

        return isinstance(self.generator, Generator)

    def generate_while_the_engine_dies(self, requests: list[Any]) -> list[Any]:
        import psutil

        running = self.generator.generate(requests)
        first = next(running)
        children = psutil.Process().children(recursive=True)
        max(children, key=lambda child: child.memory_info().rss).kill()
        return [first, *running]

    def close_half_way(self, requests: list[Any]) -> list[Any]:
        running = self.generator.generate(requests)
        first = next(running)
        running.close()
        return first

    def abort_last(self, requests: list[Any]) -> list[Any]:
        """All rollouts when the engine drops the last sample after the first request has finished."""
        engine = self.generator._engine
        running = self.generator.generate(requests)
        first = next(running)
        serial = next(self.generator._serial) - 1
        last = len(requests) - 1
        engine.abort_request([f"{serial}:{last}/{len(requests[last].seeds) - 1}"])
        return [first, *running]


def _put(stream: BinaryIO | Any, value: Any) -> None:
    data = pickle.dumps(value)
    stream.write(struct.pack("<Q", len(data)) + data)
    stream.flush()


def _get(stream: BinaryIO | Any) -> Any:
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError("the generator's process has ended")
    return pickle.loads(stream.read(struct.unpack("<Q", head)[0]))


def main() -> None:
    """Serve calls from stdin until it is closed."""
    import jaxtyping

    answers = os.fdopen(int(sys.argv[1]), "wb")
    commands = Commands()
    with jaxtyping.install_import_hook("rlprm", "beartype.beartype"):
        while True:
            try:
                name, args = _get(sys.stdin.buffer)
            except EOFError:
                break
            try:
                result: tuple[bool, Any] = (True, getattr(commands, name)(*args))
            except Exception as error:  # noqa: BLE001 - a process border: the parent raises it
                result = (False, error)
            _put(answers, result)
        if commands.generator is not None:
            commands.generator.close()


if __name__ == "__main__":
    main()
