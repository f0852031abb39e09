"""What every rollout engine shares: checks before work begins, and the one way in which weights are replaced."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlprm.engine.weights import Backend, Manifest, buckets, named_weights
from rlprm.errors import ConfigError, StaleWeights
from rlprm.roles import Request

LOAD_BUCKET_BYTES = 256 << 20
MIN_TEMPERATURE = 0.01  # vLLM raises smaller ones to this with a log line only


def read_config(model_path: str) -> Any:
    """The model folder's transformers config.

    Raises:
        ConfigError: there is no such folder, or it holds no ``config.json``.
    """
    from transformers import AutoConfig  # late: importing transformers takes seconds

    if not (Path(model_path) / "config.json").is_file():
        raise ConfigError(
            f"model folder {model_path} has no config.json; expected a Hugging Face model folder; "
            "check the path, or make one with `rlprm export`"
        )
    return AutoConfig.from_pretrained(model_path)


def expected_weights(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the causal LM that ``config`` describes, as a learner names them; takes no memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return {name: tuple(tensor.shape) for name, tensor in named_weights(model)}


def check_requests(requests: Sequence[Request], max_model_len: int, vocab_size: int) -> None:
    """Refuse what an engine would cut short, clamp or crash on, before anything is submitted.

    Raises:
        ConfigError: a prompt is empty, too long or has unknown ids; ``max_tokens`` or ``temperature`` is out of range.
    """
    for request in requests:
        prompt, name = request.prompt.tokens, request.prompt.id
        if not request.seeds or request.max_tokens < 1:
            raise ConfigError(
                f"prompt {name}: {len(request.seeds)} seeds, max_tokens {request.max_tokens}; expected 1 or more"
            )
        if not prompt or min(prompt) < 0 or max(prompt) >= vocab_size:
            raise ConfigError(
                f"prompt {name}: expected one or more token ids in [0, {vocab_size}), found {len(prompt)} ids"
                + (f" from {min(prompt)} to {max(prompt)}" if prompt else "")
                + "; use the tokenizer that belongs to the model"
            )
        if len(prompt) + request.max_tokens > max_model_len:
            raise ConfigError(
                f"prompt {name}: {len(prompt)} prompt tokens + max_tokens {request.max_tokens} exceed max_model_len "
                f"{max_model_len}; filter longer prompts, lower max_tokens or raise max_model_len"
            )
        if request.temperature < 0 or 0 < request.temperature < MIN_TEMPERATURE:
            raise ConfigError(
                f"prompt {name}: temperature {request.temperature}; expected 0 (greedy) or at least {MIN_TEMPERATURE}"
            )


def check_tokens(tokens: Sequence[Sequence[int]], max_model_len: int, vocab_size: int) -> None:
    """Refuse sequences whose log-probs an engine cannot give.

    Raises:
        ConfigError: a sequence is empty, not shorter than ``max_model_len``, or has unknown ids.
    """
    for index, row in enumerate(tokens):
        if not 1 <= len(row) < max_model_len or min(row) < 0 or max(row) >= vocab_size:
            raise ConfigError(
                f"sequence {index} has {len(row)} tokens; expected 1 to {max_model_len - 1} ids in [0, {vocab_size}); "
                "shorten it or raise max_model_len"
            )


class Loadable(ABC):
    """An engine whose weights are replaced as a whole: checked first, marked broken until complete.

    ``version`` is that of the last load, 0 before the first (the model folder's weights). Three ways in, one rule:
    :meth:`load` for tensors at hand, :meth:`load_buckets` for arrays from an object store, :meth:`load_group` for a
    process group that was joined before.
    """

    def __init__(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        self.version = 0
        self._expected = expected
        self._in_flight = 0
        self._joined = False
        self._broken = ""
        self._mended = False

    def load(self, version: int, weights: Iterator[tuple[str, Tensor]]) -> str:
        """Replace all weights in place with ``weights``; the digest of what was received.

        Raises:
            StaleWeights: the set of names or shapes is not the engine's (nothing was touched), responses are in flight,
                or an earlier load broke off.
        """
        named = list(weights)
        return self.load_buckets(version, Manifest.of(named), list(buckets(named, LOAD_BUCKET_BYTES)))

    def load_buckets(self, version: int, manifest: Manifest, packed: Sequence[Tensor | np.ndarray]) -> str:
        """As :meth:`load`, from :func:`~rlprm.engine.weights.buckets` of the manifest's tensors."""
        self._begin(manifest)
        return self._done(version, self._load_buckets(manifest, packed))

    def load_group(self, version: int, manifest: Manifest, bucket_bytes: int, digest: bool) -> str:
        """As :meth:`load`, from rank 0 of the joined group, which must :func:`~rlprm.engine.weights.send` meanwhile.

        ``digest`` False spares the hash (about a second per 2 GB) and returns "".
        """
        assert self._joined, "join_group() comes before load_group()"
        self._begin(manifest)
        return self._done(version, self._load_group(manifest, bucket_bytes, digest))

    def check(self, manifest: Manifest) -> None:
        """Refuse a manifest that :meth:`load_group` would refuse, before a sender starts to wait for receivers."""
        if not self._mended:
            self._require_whole()
        manifest.require(self._expected)

    def mend(self) -> bool:
        """After a load that broke off: make ready for another. Until that is complete nothing can be sampled.

        False: this engine cannot be mended and must be restarted.
        """
        self._mended = not self._broken or self._mend()
        return self._mended

    def join_group(self, host: str, port: int, first_rank: int, world: int, backend: Backend, timeout_s: float) -> None:
        """Join the sender's group with :attr:`group_ranks` ranks from ``first_rank``; a group joined before is left.

        Blocks until all ``world`` processes have called :func:`~rlprm.engine.weights.make_group`, or ``timeout_s``.
        """
        self._joined = False
        self._join_group(host, port, first_rank, world, backend, timeout_s)
        self._joined = True

    @property
    @abstractmethod
    def group_ranks(self) -> int:
        """How many receivers this engine brings into a group."""

    @abstractmethod
    def _mend(self) -> bool:
        """Undo what a load that broke off has left behind, other than values of weights; False: it cannot be done."""

    @abstractmethod
    def _join_group(
        self, host: str, port: int, first_rank: int, world: int, backend: Backend, timeout_s: float
    ) -> None: ...

    @abstractmethod
    def _load_buckets(self, manifest: Manifest, packed: Sequence[Tensor | np.ndarray]) -> str: ...

    @abstractmethod
    def _load_group(self, manifest: Manifest, bucket_bytes: int, digest: bool) -> str: ...

    def _begin(self, manifest: Manifest) -> None:
        self.check(manifest)
        if self._in_flight:
            raise StaleWeights(
                "a generate() is still running, and its responses would change weights half way; "
                "exhaust or close its iterator, then load"
            )
        self._broken = f"a load of {len(manifest.names)} weights after version {self.version} broke off"
        self._mended = False

    def _done(self, version: int, digest: str) -> str:
        self._broken, self.version = "", version
        return digest

    def _require_whole(self) -> None:
        if self._broken:
            raise StaleWeights(f"{self._broken}: it holds a mixture of weights; restart the engine and publish again")
