"""Rollouts from vLLM: what its two engines share, and the one that is stepped in this process (the CPU default).

Importing this module does not import vLLM; building a generator does, and that changes the process (threads, seeds,
memory policy), so it belongs in a process of its own with :func:`cpu_environment` set before it starts.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from rlprm.engine import vllm_compat
from rlprm.engine.generating import Loadable, check_requests, check_tokens, expected_weights, read_config
from rlprm.engine.weights import Backend, Manifest, as_bytes
from rlprm.errors import ConfigError, StaleWeights
from rlprm.roles import Finish, Request, Rollout

SHARED_MEMORY = "/dev/shm"  # where the object store keeps its memory too
PAGE = 4096
FINISHED: Mapping[str, Finish] = {"stop": "stop", "length": "length"}  # whatever else vLLM says is an abort


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmSettings:
    """How a vLLM engine runs. Exactly one of ``kv_cache_bytes`` and ``gpu_memory_utilization`` is a number."""

    dtype: str  # "float32", "bfloat16"
    max_model_len: int  # prompt + response, tokens
    max_num_seqs: int  # samples decoded together
    kv_cache_bytes: int | None  # per worker; committed at the start
    gpu_memory_utilization: float | None  # share of the device's memory for weights and cache
    tensor_parallel_size: int
    enforce_eager: bool  # True: no compilation and no CUDA graphs
    prefix_caching: bool
    seed: int  # of the engine; every sample has its own seed beside it
    stop_token_ids: tuple[int, ...]  # a response ends with, and keeps, the first of these

    def __post_init__(self) -> None:
        if (self.kv_cache_bytes is None) == (self.gpu_memory_utilization is None):
            raise ConfigError(
                f"kv_cache_bytes is {self.kv_cache_bytes} and gpu_memory_utilization is {self.gpu_memory_utilization}; "
                "give exactly one of them: bytes on a CPU, a share on a GPU"
            )


def cpu_environment(threads: int) -> dict[str, str]:
    """The variables a CPU rollout process needs before it imports torch: a Ray actor's ``runtime_env["env_vars"]``.

    >>> cpu_environment(1)["OMP_NUM_THREADS"]
    '1'
    """
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engine in the actor's process: a third of the start time and memory
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or two engines on one node pick the same cores
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": str(threads),  # more than the cores really owned makes each step ten times slower
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning barriers are what makes it so slow
        "TORCHDYNAMO_DISABLE": "1",  # else a helper is compiled for seconds, and needs a C++ compiler
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONWARNINGS": "ignore",
    }


class VllmLoadable(Loadable):
    """Checks, weights and log-probs over worker calls; how those calls are made is the engine's own matter."""

    def __init__(self, model_path: str, settings: VllmSettings) -> None:
        config = read_config(model_path)
        check_cache(config, settings)
        check_heads(config)
        super().__init__(expected_weights(config))
        self._settings = settings
        self._vocab_size: int = config.get_text_config().vocab_size

    @abstractmethod
    def _call_workers(self, method: str, *args: Any) -> list[Any]:
        """Run a worker method on every worker."""

    @abstractmethod
    def _reset_prefix_cache(self) -> bool:
        """Forget cached keys and values; False if some are in use."""

    @abstractmethod
    def _finished(self, prompts: Mapping[str, tuple[Any, Any]]) -> Iterator[tuple[str, Any]]:
        """Run ``{id: (prompt, sampling params)}``; yield id and vLLM's output (None: aborted) as each finishes."""

    @property
    def _local(self) -> bool:
        return False

    @property
    def group_ranks(self) -> int:
        """How many receivers this engine brings into a group: one per worker."""
        return self._settings.tensor_parallel_size

    def generate(self, requests: Sequence[Request]) -> Iterator[list[Rollout]]:
        """Yield the rollouts of one request as soon as all of them have finished, in any order of requests.

        ``logprobs`` are ``log_softmax(float32(logits) / T)`` of the sampled tokens; for greedy requests (T = 0) they
        are reported at T = 1. A sample that vLLM aborted comes back with ``finish`` "abort" and no tokens: the caller
        counts it and samples again. Closing the iterator aborts what is still running in the engine.

        Raises:
            ConfigError: a request cannot be run as it is (checked for all of them before the first is submitted).
            StaleWeights: an earlier load broke off.
        """
        self._require_whole()
        check_requests(requests, self._settings.max_model_len, self._vocab_size)
        return self._stream(list(requests))

    def logprobs(self, tokens: Sequence[Sequence[int]], temperature: float) -> list[list[float]]:
        """log mu of each given token after its prefix, at ``temperature`` (0 counts as 1); each begins with a 0.

        Exact: the engine's own float32 logits divided by the temperature. Not while a generate() is running.
        """
        self._require_whole()
        check_tokens(tokens, self._settings.max_model_len, self._vocab_size)
        assert not self._in_flight, "logprobs() would change the temperature of a generate() that is running"
        params = vllm_compat.scoring_params()
        prompts = {str(index): (vllm_compat.prompt_of(row), params) for index, row in enumerate(tokens)}
        self._call_workers("rlprm_set_temperature", float(temperature or 1.0))
        try:
            rows = {name: vllm_compat.prompt_logprobs(output) for name, output in self._finished(prompts)}
        finally:
            self._call_workers("rlprm_set_temperature", 1.0)
        return [rows[str(index)] for index in range(len(tokens))]

    def _stream(self, requests: list[Request]) -> Iterator[list[Rollout]]:
        prompts = {
            f"{at}/{sample}": (
                vllm_compat.prompt_of(request.prompt.tokens),
                vllm_compat.sampling_params(
                    request.temperature, request.max_tokens, seed, self._settings.stop_token_ids
                ),
            )
            for at, request in enumerate(requests)
            for sample, seed in enumerate(request.seeds)
        }
        done: list[dict[int, Rollout]] = [{} for _ in requests]
        outputs = self._finished(prompts)
        self._in_flight += 1
        try:
            for name, output in outputs:
                at, sample = map(int, name.split("/"))
                done[at][sample] = self._rollout(requests[at], sample, output)
                if len(done[at]) == len(requests[at].seeds):
                    yield [done[at][index] for index in range(len(done[at]))]
        finally:
            outputs.close()  # aborts what is still running
            self._in_flight -= 1

    def _rollout(self, request: Request, sample: int, output: Any) -> Rollout:
        tokens, logprobs, reason = vllm_compat.sampled(output) if output is not None else ((), (), "abort")
        finish = FINISHED.get(reason, "abort")
        return Rollout(
            prompt=request.prompt,
            sample=sample,
            tokens=tokens if finish != "abort" else (),
            logprobs=logprobs if finish != "abort" else (),
            finish=finish,
            version=self.version,
            seed=request.seeds[sample],
        )

    def _mend(self) -> bool:
        return all(self._call_workers("rlprm_mend"))

    def _join_group(
        self, host: str, port: int, first_rank: int, world: int, backend: Backend, timeout_s: float
    ) -> None:
        self._call_workers("rlprm_join_group", host, port, first_rank, world, backend, timeout_s)

    def _load_buckets(self, manifest: Manifest, packed: Sequence[Tensor | np.ndarray]) -> str:
        if self._local:
            return self._agreed(self._call_workers("rlprm_load_buckets", manifest.dumps(), packed))
        sizes = [int(bucket.nbytes) for bucket in packed]
        stride = -(-max(sizes, default=0) // PAGE) * PAGE
        _require_shared_memory(stride * len(sizes))
        with tempfile.NamedTemporaryFile(dir=SHARED_MEMORY, prefix="rlprm-weights-") as file:
            _write(file, packed, stride)
            return self._agreed(self._call_workers("rlprm_load_file", manifest.dumps(), file.name, sizes, stride))

    def _load_group(self, manifest: Manifest, bucket_bytes: int, digest: bool) -> str:
        return self._agreed(self._call_workers("rlprm_load_group", manifest.dumps(), bucket_bytes, digest))

    def _agreed(self, digests: list[str]) -> str:
        if len(set(digests)) != 1:
            raise StaleWeights(f"the workers of one engine received different weights: {digests}; restart the engine")
        if self._reset_prefix_cache() is False:
            raise StaleWeights(
                "vLLM kept cached keys of the old weights because requests are running; restart the engine"
            )
        return digests[0]


class VllmGenerator(VllmLoadable):
    """vLLM's engine, stepped by the caller's thread while it iterates over :meth:`generate`.

    With :func:`cpu_environment` everything runs in this process. One generate() at a time.
    """

    def __init__(self, model_path: str, settings: VllmSettings) -> None:
        super().__init__(model_path, settings)
        self._engine = vllm_compat.build_engine(model_path, settings)
        self._serial = count()

    def close(self) -> None:
        """Release the engine; it cannot be used afterwards."""
        if self._engine is not None:
            self._engine.engine_core.shutdown()
            self._engine = None
            self._broken = "the engine was closed"

    @property
    def _local(self) -> bool:
        return vllm_compat.workers_are_local(self._engine)

    def _call_workers(self, method: str, *args: Any) -> list[Any]:
        return self._engine.collective_rpc(method, args=args)

    def _reset_prefix_cache(self) -> bool:
        return self._engine.reset_prefix_cache()

    def _finished(self, prompts: Mapping[str, tuple[Any, Any]]) -> Iterator[tuple[str, Any]]:
        assert not self._engine.has_unfinished_requests(), "another generate() is running; exhaust or close it first"
        serial = next(self._serial)
        running = {f"{serial}:{name}": name for name in prompts}
        try:
            for request_id, name in running.items():
                self._engine.add_request(request_id, *prompts[name])
            while self._engine.has_unfinished_requests():
                for output in self._engine.step():
                    if output.finished and output.request_id in running:
                        yield running.pop(output.request_id), output
            for request_id in list(running):  # aborted by somebody else: vLLM drops them without an output
                yield running.pop(request_id), None
        finally:
            if running:
                self._engine.abort_request(list(running))


def kv_bytes_per_token(config: Any, itemsize: int) -> int | None:
    """``2 * layers * kv_heads * head_dim * itemsize`` bytes of keys and values; None for other kinds of attention."""
    config = config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    heads = getattr(config, "num_key_value_heads", None)
    if kinds != {"full_attention"} or heads is None or getattr(config, "kv_lora_rank", None):
        return None
    return 2 * config.num_hidden_layers * heads * head_size(config) * itemsize


def head_size(config: Any) -> int:
    """Numbers per attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def check_heads(config: Any) -> None:
    """Refuse on a CPU a head size that vLLM has no kernel for there: it would start, then die at the first token.

    Raises:
        ConfigError: the model's heads have another size.
    """
    size = head_size(config.get_text_config())
    if vllm_compat.on_cpu() and size not in vllm_compat.cpu_head_sizes():
        raise ConfigError(
            f"the model's attention heads have {size} numbers; on a CPU vLLM has kernels for "
            f"{vllm_compat.cpu_head_sizes()}; use another model, or the transformers engine"
        )


def check_cache(config: Any, settings: VllmSettings) -> None:
    """Refuse a cache that cannot hold one sequence of full length, before a process is started for it.

    Raises:
        ConfigError: ``kv_cache_bytes`` is too small, or ``max_model_len`` is longer than the model's positions.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and settings.max_model_len > positions:
        raise ConfigError(f"max_model_len is {settings.max_model_len}; the model has {positions} positions; lower it")
    per_token = kv_bytes_per_token(config, 4 if settings.dtype == "float32" else 2)
    if per_token is None or settings.kv_cache_bytes is None:
        return
    needed = math.ceil(per_token / settings.tensor_parallel_size) * settings.max_model_len
    if settings.kv_cache_bytes < needed:
        raise ConfigError(
            f"kv_cache_bytes is {settings.kv_cache_bytes}; one sequence of max_model_len {settings.max_model_len} "
            f"needs {needed} bytes ({per_token} per token); raise kv_cache_bytes or lower max_model_len"
        )


def _require_shared_memory(needed: int) -> None:
    free = shutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else 0
    if free < needed:
        raise ConfigError(
            f"{SHARED_MEMORY} has {free} bytes free and the weights need {needed}; enlarge it (--shm-size in a "
            "container), or send weights through a process group"
        )


def _write(file: BinaryIO | Any, packed: Sequence[Tensor | np.ndarray], stride: int) -> None:
    for index, bucket in enumerate(packed):
        file.seek(index * stride)
        file.write(as_bytes(bucket).cpu().numpy().data if isinstance(bucket, Tensor) else bucket.data)
    file.flush()
