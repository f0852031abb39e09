"""A rollout engine on plain transformers: for machines without vLLM, and the reference vLLM is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlprm.core.alignment import token_logprobs
from rlprm.engine.generating import Loadable, check_requests, check_tokens, read_config
from rlprm.engine.weights import Backend, Digest, Group, Manifest, make_group, named_weights, receive, recorded, unpack
from rlprm.roles import Finish, Request, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class HfSettings:
    """How the transformers engine runs."""

    dtype: str  # "float32", "bfloat16"
    device: str  # "cpu", "cuda"
    max_model_len: int  # prompt + response, tokens
    max_num_seqs: int  # samples decoded together; one request's samples are never split
    stop_token_ids: tuple[int, ...]  # a response ends with, and keeps, the first of these


class HfGenerator(Loadable):
    """Batched sampling with a KV cache; a sample depends on its prompt, seed and temperature, not on its neighbours.

    Each sample owns a generator seeded with its seed, and its n-th uniform number picks its n-th token by the inverse
    of the cumulative distribution (float64). Log-probs are ``log_softmax(float32(logits) / T)`` of the sampled tokens;
    for greedy requests (T = 0) they are reported at T = 1, as vLLM does. A seed gives other samples than in vLLM.
    """

    def __init__(self, model_path: str, settings: HfSettings) -> None:
        from transformers import AutoModelForCausalLM  # late: seconds to import

        config = read_config(model_path)
        self._settings = settings
        self._model = AutoModelForCausalLM.from_pretrained(
            model_path, config=config, dtype=getattr(torch, settings.dtype), local_files_only=True
        )
        self._model.to(settings.device).eval()
        self._vocab_size = config.get_text_config().vocab_size
        self._weights = dict(named_weights(self._model))
        self._group: Group | None = None
        super().__init__({name: tuple(tensor.shape) for name, tensor in self._weights.items()})

    def generate(self, requests: Sequence[Request]) -> Iterator[list[Rollout]]:
        """Yield the rollouts of one request as soon as all of them have finished, in any order of requests.

        Raises:
            ConfigError: a request cannot be run as it is (checked for all of them before the first is run).
            StaleWeights: an earlier load broke off.
        """
        self._require_whole()
        check_requests(requests, self._settings.max_model_len, self._vocab_size)
        return self._stream(list(requests))

    def logprobs(self, tokens: Sequence[Sequence[int]], temperature: float) -> list[list[float]]:
        """log mu of each given token after its prefix, at ``temperature`` (0 counts as 1); each begins with a 0."""
        self._require_whole()
        check_tokens(tokens, self._settings.max_model_len, self._vocab_size)
        size = self._settings.max_num_seqs
        return [
            row for at in range(0, len(tokens), size) for row in self._score_rows(tokens[at : at + size], temperature)
        ]

    @property
    def group_ranks(self) -> int:
        """How many receivers this engine brings into a group."""
        return 1

    def close(self) -> None:
        """Release the model; the engine cannot be used afterwards."""
        self._broken = "the engine was closed"
        if self._group is not None:
            self._group.leave()
        self._weights, self._model, self._group = {}, torch.nn.Identity(), None

    def _mend(self) -> bool:
        return bool(self._weights)  # each is copied in place, so a mixture is all that a load can leave

    def _join_group(
        self, host: str, port: int, first_rank: int, world: int, backend: Backend, timeout_s: float
    ) -> None:
        if self._group is not None:
            self._group.leave()
        self._group = make_group(host, port, first_rank, world, backend, timeout_s)

    def _load_buckets(self, manifest: Manifest, packed: Sequence[Tensor | np.ndarray]) -> str:
        digest = Digest()
        self._copy(recorded(unpack(manifest, packed), digest))
        return digest.hexdigest()

    def _load_group(self, manifest: Manifest, bucket_bytes: int, digest: bool) -> str:
        assert self._group is not None
        seen = Digest()
        received = unpack(manifest, receive(self._group, manifest, bucket_bytes))
        self._copy(recorded(received, seen if digest else None))
        return seen.hexdigest() if digest else ""

    @torch.no_grad()
    def _copy(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            self._weights[name].copy_(tensor)

    def _stream(self, requests: list[Request]) -> Iterator[list[Rollout]]:
        self._in_flight += 1
        try:
            for batch in _batches(requests, self._settings.max_num_seqs):
                yield from self._sample(batch)
        finally:
            self._in_flight -= 1

    @torch.no_grad()
    def _sample(self, requests: list[Request]) -> Iterator[list[Rollout]]:
        """Decode all samples of ``requests`` together; a request is yielded when its last sample has finished."""
        rows = [(request, sample) for request in requests for sample in range(len(request.seeds))]
        device = torch.device(self._settings.device)
        ids, mask = _left_padded([request.prompt.tokens for request, _ in rows], device)
        temperatures = torch.tensor([request.temperature for request, _ in rows], device=device)
        uniforms = _uniforms(rows).to(device)
        tokens: list[list[int]] = [[] for _ in rows]
        logprobs: list[list[float]] = [[] for _ in rows]
        finish: list[Finish | None] = [None] * len(rows)
        ends = list(accumulate(len(request.seeds) for request in requests))
        own = [range(end - len(request.seeds), end) for request, end in zip(requests, ends, strict=True)]
        waiting = set(range(len(requests)))
        cache, positions = None, (mask.cumsum(1) - 1).clamp(min=0)
        for turn in range(uniforms.shape[1]):
            out = self._model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip
            cache = out.past_key_values
            picked, picked_logprobs = _pick(out.logits[:, -1].float(), temperatures, uniforms[:, turn])
            for index, (token, logprob) in enumerate(zip(picked.tolist(), picked_logprobs.tolist(), strict=True)):
                if finish[index] is None:
                    tokens[index].append(token)
                    logprobs[index].append(logprob)
                    if token in self._settings.stop_token_ids:
                        finish[index] = "stop"
                    elif turn + 1 == rows[index][0].max_tokens:
                        finish[index] = "length"
            for which in sorted(waiting):
                if all(finish[index] for index in own[which]):
                    waiting.remove(which)
                    yield [self._rollout(*rows[i], tokens[i], logprobs[i], finish[i]) for i in own[which]]
            if not waiting:
                return
            ids, positions = picked[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)

    def _rollout(
        self, request: Request, sample: int, tokens: list[int], logprobs: list[float], finish: Finish | None
    ) -> Rollout:
        assert finish is not None
        return Rollout(
            prompt=request.prompt,
            sample=sample,
            tokens=tuple(tokens),
            logprobs=tuple(logprobs),
            finish=finish,
            version=self.version,
            seed=request.seeds[sample],
        )

    @torch.no_grad()
    def _score_rows(self, rows: Sequence[Sequence[int]], temperature: float) -> list[list[float]]:
        device = torch.device(self._settings.device)
        lengths = [len(row) for row in rows]
        ids = torch.zeros(len(rows), max(lengths), dtype=torch.long, device=device)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row, device=device)
        mask = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
        logits = self._model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
        owner = torch.where(mask, torch.arange(len(rows), device=device)[:, None], -1)
        own = token_logprobs(logits, ids, owner, float(temperature or 1.0)).tolist()
        return [row[:length] for row, length in zip(own, lengths, strict=True)]


def _batches(requests: list[Request], max_num_seqs: int) -> Iterator[list[Request]]:
    batch: list[Request] = []
    for request in requests:
        if batch and sum(len(other.seeds) for other in batch) + len(request.seeds) > max_num_seqs:
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


def _left_padded(
    prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int[Tensor, "rows width"], Int[Tensor, "rows width"]]:
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for index, prompt in enumerate(prompts):
        ids[index, width - len(prompt) :] = torch.tensor(prompt)
        mask[index, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _uniforms(rows: Sequence[tuple[Request, int]]) -> Float[Tensor, "rows turns"]:
    """The uniform numbers of each sample, from a generator of its own; 0 after its last turn."""
    drawn = torch.zeros(len(rows), max(request.max_tokens for request, _ in rows), dtype=torch.float64)
    for index, (request, sample) in enumerate(rows):
        generator = torch.Generator().manual_seed(request.seeds[sample])
        drawn[index, : request.max_tokens] = torch.rand(request.max_tokens, generator=generator, dtype=torch.float64)
    return drawn


def _pick(
    logits: Float[Tensor, "rows vocab"], temperatures: Float[Tensor, " rows"], uniforms: Float[Tensor, " rows"]
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """The token at each row's uniform number, and its log-prob."""
    greedy = temperatures == 0
    logprobs = torch.log_softmax(logits / torch.where(greedy, 1.0, temperatures)[:, None], dim=-1)
    cumulative = logprobs.double().exp().cumsum(-1)
    # right=True: a uniform of exactly 0 must not pick a first token of probability 0; the total may miss 1 by rounding
    drawn = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True).squeeze(-1)
    picked = torch.where(greedy, logits.argmax(-1), drawn.clamp(max=logits.shape[-1] - 1))
    return picked, logprobs.gather(-1, picked[:, None]).squeeze(-1)
