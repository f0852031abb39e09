"""Rollouts from vLLM's asynchronous engine: continuous batching in a child process (the GPU default)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import Future
from itertools import count
from queue import SimpleQueue
from typing import Any

from rlprm.engine import vllm_compat
from rlprm.engine.generator_vllm import VllmLoadable, VllmSettings
from rlprm.errors import WorkerLost


class VllmAsyncGenerator(VllmLoadable):
    """The same role as :class:`~rlprm.engine.generator_vllm.VllmGenerator`; the engine works while the caller does not.

    Its event loop lives in a private thread, so the methods are ordinary ones. Several generate() may run at once.
    """

    def __init__(self, model_path: str, settings: VllmSettings) -> None:
        super().__init__(model_path, settings)
        self._serial = count()
        self._engine: Any = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rlprm-vllm", daemon=True)
        self._thread.start()
        try:
            self._engine = self._wait(self._start(model_path, settings))
        finally:
            if self._engine is None:
                self._stop_loop()

    def close(self) -> None:
        """End the engine's processes and the loop's thread; it cannot be used afterwards."""
        if self._engine is None:
            return
        self._broken = "the engine was closed"
        engine, self._engine = self._engine, None
        self._result(asyncio.run_coroutine_threadsafe(_end(engine), self._loop))
        self._stop_loop()

    async def _start(self, model_path: str, settings: VllmSettings) -> Any:
        # in the loop: the engine binds its output handler to the loop it is built in
        return vllm_compat.build_async_engine(model_path, settings)

    def _call_workers(self, method: str, *args: Any) -> list[Any]:
        return self._wait(self._engine.collective_rpc(method, args=args))

    def _reset_prefix_cache(self) -> bool:
        return self._wait(self._engine.reset_prefix_cache())

    def _finished(self, prompts: Mapping[str, tuple[Any, Any]]) -> Iterator[tuple[str, Any]]:
        finished: SimpleQueue[tuple[str, Any] | None] = SimpleQueue()
        whole = asyncio.run_coroutine_threadsafe(self._run(next(self._serial), prompts, finished), self._loop)
        # the end mark wakes the reader also when a sample failed: nobody waits for what will not come
        whole.add_done_callback(lambda _: finished.put(None))
        try:
            while (item := finished.get()) is not None:
                yield item
            self._result(whole)
        finally:
            whole.cancel()

    async def _run(
        self, serial: int, prompts: Mapping[str, tuple[Any, Any]], finished: SimpleQueue[tuple[str, Any] | None]
    ) -> None:
        async def one(name: str, prompt: Any, params: Any) -> None:
            last = None
            async for output in self._engine.generate(prompt, params, f"{serial}:{name}"):
                last = output
            finished.put((name, last))

        tasks = [asyncio.create_task(one(name, *prompts[name])) for name in prompts]
        try:
            await asyncio.gather(*tasks)
        finally:  # one failure, or the reader going away, ends all samples; cancelled ones are aborted in the engine
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _wait(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self._result(asyncio.run_coroutine_threadsafe(coroutine, self._loop))

    def _result(self, future: Future[Any]) -> Any:
        try:
            return future.result()
        except vllm_compat.engine_died() as error:
            raise WorkerLost(
                f"vLLM's engine process has ended: {error}; its own log says why; restart the engine"
            ) from error

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _end(engine: Any) -> None:
    """Shut the engine down and see off the tasks it leaves in the loop, which would complain about a stopped one."""
    engine.shutdown()
    left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
