"""The one place that touches vLLM's own names, so that a change between its releases is met here and nowhere else.

Used of vLLM: ``EngineArgs`` / ``AsyncEngineArgs``, ``LLMEngine`` (add_request, step, abort_request, collective_rpc,
reset_prefix_cache), ``AsyncLLM`` (generate, collective_rpc, reset_prefix_cache, shutdown), ``SamplingParams``, and
in the worker ``model_runner.reload_weights(weights_iterator=...)`` and ``dispatch_cpu_unquantized_gemm``. All of them
have the same names and leading arguments in 0.26.0 (read) and 0.32.0 (run). Nothing is imported before it is needed:
importing vLLM changes the process (threads, seeds).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlprm.errors import ConfigError

if TYPE_CHECKING:
    from rlprm.engine.generator_vllm import VllmSettings

WORKER_EXTENSION = "rlprm.engine.vllm_worker.WeightReceiver"


def build_engine(model_path: str, settings: VllmSettings) -> Any:
    """The step-loop engine.

    Raises:
        ConfigError: vLLM refuses the settings.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    return _started(LLMEngine, EngineArgs, model_path, settings)


def build_async_engine(model_path: str, settings: VllmSettings) -> Any:
    """The asynchronous engine; call it inside the event loop that will serve it.

    Raises:
        ConfigError: vLLM refuses the settings.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    return _started(AsyncLLM, AsyncEngineArgs, model_path, settings)


def sampling_params(temperature: float, max_tokens: int, seed: int, stop_token_ids: Sequence[int]) -> Any:
    """Plain sampling from ``softmax(logits / temperature)``: no top-p, top-k or penalty, which would change log mu."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        temperature=temperature,
        max_tokens=max_tokens,
        # vLLM takes -1 for "no seed"; a seed is a name, so another bit pattern of the same 64 bits does
        seed=seed % (1 << 63),
        stop_token_ids=list(stop_token_ids),
        ignore_eos=True,  # the tokens that end a response are those in stop_token_ids, nothing else
        top_p=1.0,
        logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def scoring_params() -> Any:
    """Log-probs of a prompt's own tokens; the one token that must be sampled is thrown away."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        temperature=0.0,
        max_tokens=1,
        prompt_logprobs=0,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def prompt_of(tokens: Sequence[int]) -> Any:
    """Token ids as vLLM takes them."""
    return {"prompt_token_ids": list(tokens)}


def sampled(output: Any) -> tuple[tuple[int, ...], tuple[float, ...], str]:
    """Tokens, their log-probs and the finish reason of a finished request with one sample."""
    (completion,) = output.outputs
    tokens = tuple(completion.token_ids)
    logprobs = tuple(entry[token].logprob for token, entry in zip(tokens, completion.logprobs or (), strict=True))
    return tokens, logprobs, completion.finish_reason


def prompt_logprobs(output: Any) -> list[float]:
    """Log-probs of the prompt's tokens, 0 for the first."""
    tokens, entries = output.prompt_token_ids, output.prompt_logprobs
    return [0.0, *(entry[token].logprob for token, entry in zip(tokens[1:], entries[1:], strict=True))]


def workers_are_local(engine: Any) -> bool:
    """Does the only worker live in this process, so that a call can hand it tensors by reference?"""
    # an attribute of LLMEngine only when its core was not put into a child process
    executor = getattr(engine, "model_executor", None)
    return executor is not None and engine.vllm_config.parallel_config.world_size == 1


def engine_died() -> type[Exception]:
    """The error with which the asynchronous engine reports that its child process is gone."""
    from vllm.v1.engine.exceptions import EngineDeadError

    return EngineDeadError


def on_cpu() -> bool:
    """Does vLLM run on the CPU here?"""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def cpu_head_sizes() -> list[int]:
    """The attention head sizes vLLM has CPU kernels for."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return list(CPUAttentionBackend.get_supported_head_sizes())


def repack_linear(module: Any) -> None:
    """Build the module's packed CPU kernel again from its present weight."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    dispatch_cpu_unquantized_gemm(module, remove_weight=False)


def end_reload(model_runner: Any) -> bool:
    """End a reload whose iterator failed: layers that had not all their weights get the tensors back that they had.

    vLLM itself leaves them without storage, and would count what had come already towards the next reload. False: this
    release keeps its reloads in another way.
    """
    try:
        from vllm.model_executor.model_loader.reload import layerwise
    except ImportError:
        return False
    model = model_runner.get_model()
    if not all(hasattr(layerwise, name) for name in ("get_layerwise_info", "finalize_layerwise_reload")):
        return False
    for layer in model.modules():
        info = layerwise.get_layerwise_info(layer)
        if info.can_load():
            info.load_numel = 0  # as if none had come; the end of a reload places the old tensors back then
            info.loaded_weights.clear()
    layerwise.finalize_layerwise_reload(model, model_runner.model_config)
    return True


def _started(engine: Any, arguments: Any, model_path: str, settings: VllmSettings) -> Any:
    values = _values(model_path, settings)
    unknown = sorted(set(values) - {field.name for field in dataclasses.fields(arguments)})
    if unknown:
        import vllm

        raise ConfigError(
            f"vLLM {vllm.__version__} has no engine arguments {unknown}; install a release from 0.26 to 0.32"
        )
    try:
        return engine.from_engine_args(arguments(**values))
    except (ValueError, RuntimeError) as error:
        # a child process's own reason is in its log only; vLLM's message in this process points there
        raise ConfigError(
            f"vLLM cannot start from {model_path} with {settings}: {' '.join(str(error).split())}; "
            "change the setting it names, or give the engine more memory"
        ) from error


PREFILL_TOKENS = 2048  # prompt tokens that one pass of a CPU engine takes in


def _values(model_path: str, settings: VllmSettings) -> dict[str, Any]:
    memory = (
        {"kv_cache_memory_bytes": settings.kv_cache_bytes}
        if settings.kv_cache_bytes is not None
        else {"gpu_memory_utilization": settings.gpu_memory_utilization}
    )
    return {
        "model": model_path,
        "skip_tokenizer_init": True,  # token ids in, token ids out
        "generation_config": "vllm",  # the model folder's own top_k, penalties... must not steer sampling
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "enforce_eager": settings.enforce_eager,
        "enable_prefix_caching": settings.prefix_caching,
        "seed": settings.seed,
        "logprobs_mode": "processed_logprobs",  # the default ignores the temperature
        "worker_extension_cls": WORKER_EXTENSION,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        **memory,
        **_prefill(settings),
    }


def _prefill(settings: VllmSettings) -> dict[str, Any]:
    """On a CPU no prompt may be prefilled in parts.

    After a part vLLM rewinds a seeded request's random generator by an offset, which CPU generators do not have: the
    engine dies with "CPU Generator does not use offset" as soon as one batch holds more prompt tokens than fit.
    """
    if settings.kv_cache_bytes is None:
        return {}
    return {
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(settings.max_model_len, PREFILL_TOKENS),
    }
