"""Rollout engines by name, for ``conf/rollout/``: what the run knows comes first, what a YAML chooses by keyword."""

from __future__ import annotations

from rlprm.roles import Generator


def vllm(
    model_path: str,
    dtype: str,
    device: str,
    max_model_len: int,
    tensor_parallel: int,
    stop_token_ids: tuple[int, ...],
    *,
    max_num_seqs: int,
    kv_cache_bytes: int | None,
    gpu_memory_utilization: float | None,
    enforce_eager: bool,
    prefix_caching: bool,
    asynchronous: bool,
) -> Generator:
    """vLLM: stepped in this process, or its asynchronous engine with a loop of its own."""
    from rlprm.engine.generator_vllm import VllmGenerator, VllmSettings

    settings = VllmSettings(
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        kv_cache_bytes=kv_cache_bytes,
        gpu_memory_utilization=gpu_memory_utilization,
        tensor_parallel_size=tensor_parallel,
        enforce_eager=enforce_eager,
        prefix_caching=prefix_caching,
        seed=0,  # every response has its own seed
        stop_token_ids=stop_token_ids,
    )
    if not asynchronous:
        return VllmGenerator(model_path, settings)
    from rlprm.engine.vllm_async import VllmAsyncGenerator

    return VllmAsyncGenerator(model_path, settings)


def transformers(
    model_path: str,
    dtype: str,
    device: str,
    max_model_len: int,
    tensor_parallel: int,
    stop_token_ids: tuple[int, ...],
    *,
    max_num_seqs: int,
) -> Generator:
    """Plain transformers: for machines without vLLM, and the reference that vLLM is compared with.

    Raises:
        ConfigError: tensor parallelism, which this engine does not have.
    """
    from rlprm.engine.generator_hf import HfGenerator, HfSettings
    from rlprm.errors import ConfigError

    if tensor_parallel != 1:
        raise ConfigError(f"placement.tensor_parallel is {tensor_parallel}; rollout=transformers runs on one device")
    return HfGenerator(
        model_path,
        HfSettings(
            dtype=dtype,
            device=device,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            stop_token_ids=stop_token_ids,
        ),
    )
