"""Flow rewards: tokens whose hidden states are unlike those of right responses are punished (RLFR, arXiv:2510.10201)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlprm.batch import flat_response_mask, unflatten
from rlprm.core.flow_reward import debiased, flow_rewards
from rlprm.core.metrics import Mean, Sum
from rlprm.engine.combine import Measured, agreed
from rlprm.engine.distributed import rank
from rlprm.engine.flow import Condition, FlowNetwork, LayerStates, pairs
from rlprm.engine.scoring import flat_micro_batches, on_device
from rlprm.errors import CheckpointError, ConfigError
from rlprm.records import JaggedShard, MicroBatch, Stream
from rlprm.sources.base import OWN, ProcessSource, Scorable, Scores, SourceContext

STATE = "flow.pt"


class FlowReward(ProcessSource):
    """``-price * s_t`` for the ``keep`` most deviating tokens of a response, 0 for the others (see :func:`flow_rewards`).

    The deviation is that of a :class:`FlowNetwork` from the velocity of the token's hidden state in the frozen ``model``,
    averaged over ``percentiles`` of its depth and, debiased, over ``taus``. The network is trained on the hidden states of
    right responses: `score` first, then `learn` from the same batch, so no response is judged by a network that has
    learnt from it. ``learn_at``: noise levels of training, the rewarding ones (``taus``, as the authors' RL code does) or
    ``uniform`` over (0, 1).

    Differs: noise is drawn from (seed, step, row, layer, tau), anew for rewards and for each pass of learning, so equal
    runs give equal rewards, however rows are spread over ranks; the authors draw fresh noise at each call. They train the
    network offline on good solutions beforehand; here it may start from a state that an earlier run saved (``initial``),
    and pays nothing in its first ``quiet`` steps, in which it only learns: a new network deviates by the size of a state,
    not by how unusual it is.
    """

    stateful = True

    def __init__(
        self,
        context: SourceContext,
        *,
        percentiles: list[float],
        condition: Condition,
        width: int | None,
        depth: int,
        taus: list[float],
        threshold: float,
        keep: int,
        price: float,
        learn_at: Literal["reward", "uniform"],
        lr: float,
        betas: list[float],
        weight_decay: float,
        epochs: int,
        quiet: int,
        initial: str | None,
    ) -> None:
        assert context.model is not None
        self.name = context.name
        self._context = context
        self._states = LayerStates(
            context.model, context.dtype, context.device, percentiles, attention=context.attention
        )
        self._condition: Condition = condition
        self._taus = taus
        self._threshold, self._keep, self._price = threshold, keep, price
        self._learn_at = learn_at
        self._epochs, self._quiet = epochs, quiet
        with torch.random.fork_rng():
            torch.manual_seed(context.seed)  # the same on every rank
            network = FlowNetwork(self._states.hidden, width=width or self._states.hidden, depth=depth)
        self._network = network.to(context.device)
        first, second = betas
        self._optimizer = torch.optim.AdamW(
            self._network.parameters(), lr=lr, betas=(first, second), weight_decay=weight_decay
        )
        self._steps = 0
        if initial is not None:
            self._read(Path(initial), optimizer=False)

    @classmethod
    def check(cls, *, model: str | None, learner: bool, **settings: Any) -> None:
        """Refuse settings that no step could work with.

        Raises:
            ConfigError: no model, a learner, or a number out of range.
        """
        if model is None or learner:
            raise ConfigError(
                "a flow reward reads the hidden states of a frozen model and trains a network of its own; set model to the "
                "folder and learner to null"
            )
        flow_rewards(
            torch.zeros(1, 1),
            torch.ones(1, 1, dtype=torch.bool),
            threshold=settings["threshold"],
            keep=settings["keep"],
            price=settings["price"],
        )
        debiased(torch.zeros(len(settings["taus"]), 1), torch.tensor(settings["taus"], dtype=torch.float64))
        if not settings["taus"] or len(settings["betas"]) != 2:
            raise ConfigError(f"taus is {settings['taus']} and betas {settings['betas']}; expected 1 or more, and 2")
        for name, least in (("depth", 1), ("epochs", 1), ("quiet", 0), ("width", 1)):
            if settings[name] is not None and settings[name] < least:
                raise ConfigError(f"{name} is {settings[name]}; expected at least {least}")

    def score(self, given: Scorable) -> Scores:
        """Rewards of every response token that has a deviation; absent in the ``quiet`` steps."""
        shard, mask = given.shard, flat_response_mask(given.shard)
        deviation = torch.zeros(len(shard.tokens), dtype=torch.float64)
        judged = torch.zeros_like(mask)
        for micro, keys in self._micro_batches(shard, given.step, "score"):
            with torch.no_grad():
                found = [
                    debiased(
                        torch.stack([self._errors(target, condition, keys, depth, tau) for tau in self._taus]).cpu(),
                        torch.tensor(self._taus, dtype=torch.float64),
                    )
                    for depth, target, condition in self._pairs(micro)
                ]
            where = micro.token_fields["place"].flatten()[pairs(micro, self._condition)[0]].cpu()
            deviation[where] = torch.stack(found).mean(0)
            judged[where] = True
        present = (
            unflatten(judged, shard.lengths)
            if self._steps >= self._quiet
            else unflatten(torch.zeros_like(mask), shard.lengths)
        )
        rewards = flow_rewards(
            unflatten(deviation, shard.lengths), present, threshold=self._threshold, keep=self._keep, price=self._price
        ).float()
        return Scores(
            streams={OWN: Stream(rewards=rewards, present=present)},
            measurement=None,
            metrics=Measured(
                partial={
                    "flow/deviation": Mean.of(deviation, judged),
                    "flow/frac_punished": Mean.of((rewards < 0).double(), present),
                },
                agreed={},
            ),
        )

    def learn(self, given: Scorable) -> Measured:
        """``epochs`` optimizer steps on the right responses that train; gradients are summed over all ranks."""
        shard = given.shard
        right = (shard.train & shard.outcome_present & (shard.outcome > 0.5)).nonzero().flatten()
        losses, norms = [], []
        self._steps += 1
        for epoch in range(self._epochs):
            work = list(self._micro_batches(rows_of(shard, right), given.step, f"learn {epoch}"))
            count = float(self._context.reduce.sum(torch.tensor(float(sum(len(keys) for _, keys in work)))))
            if count == 0:
                break
            self._optimizer.zero_grad(set_to_none=False)
            total = 0.0
            for micro, keys in work:
                loss = self._loss(micro, keys) / count
                loss.backward()
                total += float(loss.detach())
            norms.append(self._step())
            losses.append(total)
        if not norms:
            return agreed()
        return Measured(
            partial={"flow/loss": Sum(losses[-1])},
            agreed={"flow/grad_norm": norms[-1], "flow/updates": float(len(norms))},
        )

    def _loss(self, micro: MicroBatch, keys: Sequence[tuple[object, ...]]) -> Float[Tensor, ""]:
        """Sum over tokens of the mean error over layers and noise levels."""
        taus = self._taus if self._learn_at == "reward" else [None]
        losses = [
            self._errors(target, condition, keys, depth, tau).sum()
            for depth, target, condition in self._pairs(micro)
            for tau in taus
        ]
        return torch.stack(losses).mean()

    def _step(self) -> float:
        parameters = list(self._network.parameters())
        gradients = torch.cat(
            [each.grad.flatten() if each.grad is not None else torch.zeros_like(each).flatten() for each in parameters]
        )
        summed = self._context.reduce.sum(gradients)
        for each, part in zip(parameters, summed.split([p.numel() for p in parameters]), strict=True):
            each.grad = part.view_as(each)
        self._optimizer.step()
        return float(summed.double().norm())

    def _errors(
        self,
        target: Float[Tensor, "n h"],
        condition: Float[Tensor, "n h"],
        keys: Sequence[tuple[object, ...]],
        depth: float,
        tau: float | None,
    ) -> Float[Tensor, " n"]:
        """Errors at noise level ``tau``, with noise of its own for each tau; None: each pair at a drawn level."""
        level = (
            torch.cat([draw((*key, "level", depth), (size,), "uniform") for key, size in counted(keys)])
            if tau is None
            else torch.full((len(keys),), tau)
        )
        noise = torch.cat(
            [draw((*key, "noise", depth, tau), (size, target.shape[1]), "normal") for key, size in counted(keys)]
        )
        return self._network.errors(target, condition, noise.to(target), level.to(target), depth)

    def _pairs(self, micro: MicroBatch) -> Iterator[tuple[float, Tensor, Tensor]]:
        """(depth, states that are judged, states that they are judged by) of each layer."""
        judged, by = pairs(micro, self._condition)
        for depth, states in zip(self._states.depths, self._states(micro), strict=True):
            yield depth, states[judged], states[by]

    def _micro_batches(
        self, shard: JaggedShard, step: int, purpose: str
    ) -> Iterator[tuple[MicroBatch, list[tuple[object, ...]]]]:
        """Micro-batches with pairs in them, and for each pair what its noise is drawn from: its row's key."""
        row_of = shard.row.repeat_interleave(shard.lengths)
        for found in flat_micro_batches(shard, self._context.token_budget, self._context.layout):
            micro = on_device(found, self._context.device)
            where = found.token_fields["place"].flatten()[pairs(found, self._condition)[0]]
            keys = [(self._context.seed, self.name, step, purpose, row) for row in row_of[where].tolist()]
            if keys:
                yield micro, keys

    def save(self, folder: str) -> None:
        """Network, optimizer and step count; the ranks hold the same, so one writes."""
        if rank() == 0:
            Path(folder).mkdir(parents=True, exist_ok=True)
            state = {
                "network": self._network.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "steps": self._steps,
            }
            torch.save(state, Path(folder) / STATE)

    def load(self, folder: str) -> None:
        """Go on from what :meth:`save` wrote.

        Raises:
            CheckpointError: it is missing, damaged, or of a network of another shape.
        """
        self._read(Path(folder) / STATE, optimizer=True)

    def _read(self, file: Path, *, optimizer: bool) -> None:
        try:
            state = torch.load(file, map_location=self._context.device, weights_only=True)
            self._network.load_state_dict(state["network"])
            if optimizer:
                self._optimizer.load_state_dict(state["optimizer"])
            self._steps = int(state["steps"])
        except (OSError, RuntimeError, KeyError, ValueError, EOFError) as error:
            raise CheckpointError(
                f"the flow network cannot be read from {file}: {str(error).splitlines()[0]}; expected a file {STATE} that a "
                "flow reward of the same model, width and depth has saved"
            ) from error


def rows_of(shard: JaggedShard, rows: Int[Tensor, " n"]) -> JaggedShard:
    """The shard's ``rows`` alone, tokens and all."""
    chosen = torch.zeros(len(shard), dtype=torch.bool)
    chosen[rows] = True
    flat = chosen.repeat_interleave(shard.lengths)
    names = ("tokens", "rollout_logprobs", "step_index", "step_label")
    return JaggedShard(
        **{name: getattr(shard, name)[flat if name in names else chosen] for name in JaggedShard.__dataclass_fields__}
    )


def counted(keys: Sequence[tuple[object, ...]]) -> list[tuple[tuple[object, ...], int]]:
    """Runs of equal keys with their lengths.

    >>> counted([("a",), ("a",), ("b",)])
    [(('a',), 2), (('b',), 1)]
    """
    found: list[tuple[tuple[object, ...], int]] = []
    for key in keys:
        if found and found[-1][0] == key:
            found[-1] = key, found[-1][1] + 1
        else:
            found.append((key, 1))
    return found


def draw(key: tuple[object, ...], shape: tuple[int, ...], kind: Literal["normal", "uniform"]) -> Tensor:
    """Random numbers that depend on the key alone.

    >>> bool((draw((1, "a"), (3,), "normal") == draw((1, "a"), (3,), "normal")).all())
    True
    """
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=6).digest(), "big")
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) if kind == "normal" else torch.rand(shape, generator=generator)
