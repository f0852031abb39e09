"""What runs inside each vLLM worker: weights replaced in place, and log-probs at a temperature.

vLLM mixes :class:`WeightReceiver` into its worker class by name, so every attribute carries the prefix ``rlprm_``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlprm.engine import vllm_compat
from rlprm.engine.weights import Backend, Digest, Group, Manifest, make_group, receive, recorded, unpack
from rlprm.errors import StaleWeights


class WeightReceiver:
    """Worker methods called through ``collective_rpc``; arguments and results are plain types across processes."""

    model_runner: Any  # of the worker class this is mixed into
    rank: int
    rlprm_group: Group | None = None

    def rlprm_join_group(
        self, host: str, port: int, first_rank: int, world: int, backend: Backend, timeout_s: float
    ) -> None:
        """Join the sender's group; the workers of one engine take consecutive ranks."""
        if self.rlprm_group is not None:
            self.rlprm_group.leave()
        self.rlprm_group = make_group(host, port, first_rank + self.rank, world, backend, timeout_s)

    def rlprm_load_buckets(self, manifest: str, packed: Sequence[Tensor | np.ndarray]) -> str:
        """Replace all weights by those in ``packed`` (the worker lives in the caller's process)."""
        return self.rlprm_replace(Manifest.loads(manifest), packed, True)

    def rlprm_load_file(self, manifest: str, path: str, sizes: list[int], stride: int) -> str:
        """Replace all weights by those in a shared-memory file whose buckets begin at multiples of ``stride``."""
        return self.rlprm_replace(Manifest.loads(manifest), _mapped(path, sizes, stride), True)

    def rlprm_load_group(self, manifest: str, bucket_bytes: int, digest: bool) -> str:
        """Replace all weights by those that rank 0 of the group sends meanwhile."""
        assert self.rlprm_group is not None, "rlprm_join_group() comes before"
        announced = Manifest.loads(manifest)
        return self.rlprm_replace(announced, receive(self.rlprm_group, announced, bucket_bytes), digest)

    def rlprm_replace(self, manifest: Manifest, packed: Iterable[Tensor | np.ndarray], digest: bool) -> str:
        """Reload layer by layer, rebuild what the reload leaves stale, and return the digest of the bytes received.

        Raises:
            StaleWeights: the model did not read all the weights.
        """
        seen, count = Digest(), 0

        def counted() -> Iterator[tuple[str, Tensor]]:
            nonlocal count
            for pair in recorded(unpack(manifest, packed), seen if digest else None):
                count += 1
                yield pair

        self.model_runner.reload_weights(weights_iterator=counted())
        if count != len(manifest.names):
            raise StaleWeights(f"vLLM read {count} of {len(manifest.names)} weights; restart the engine")
        repack_tied(self.model_runner.get_model())
        return seen.hexdigest() if digest else ""

    def rlprm_mend(self) -> bool:
        """Put the tensors back that a reload which broke off has taken away; False: this vLLM cannot do it."""
        return vllm_compat.end_reload(self.model_runner)

    def rlprm_set_temperature(self, temperature: float) -> None:
        """Divide the logits by ``temperature`` (float32, as the sampler does) until it is set to 1 again.

        vLLM scores prompt tokens with raw logits in every ``logprobs_mode``; dividing where the logits are made is
        exact and the same code for all its runners. Nothing may be sampled meanwhile.
        """
        model = self.model_runner.get_model()
        model.__dict__.pop("compute_logits", None)
        if temperature == 1.0:
            return
        plain = model.compute_logits

        def scaled(*args: Any, **kwargs: Any) -> Tensor | None:
            logits = plain(*args, **kwargs)
            # under tensor parallelism some ranks get no logits
            return None if logits is None else logits.float() / temperature

        model.compute_logits = scaled


def repack_tied(model: torch.nn.Module) -> None:
    """Rebuild the packed CPU kernels of layers that still own a plain weight: a tied ``lm_head`` / embedding.

    A reload packs each layer's kernel again except for these, whose weight tensor is updated while the kernel keeps a
    copy of the old one: log-probs are then 0.1 nats off, silently. On GPUs there is no packed copy.
    """
    if not vllm_compat.on_cpu():
        return
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "cpu_linear") and weight is not None and weight.numel() > 0:
            vllm_compat.repack_linear(module)


def _mapped(path: str, sizes: list[int], stride: int) -> list[np.ndarray]:
    if not sizes:
        return []
    whole = np.memmap(path, dtype=np.uint8, mode="r")
    return [whole[index * stride : index * stride + size] for index, size in enumerate(sizes)]
