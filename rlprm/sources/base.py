"""What every process source is: rewards for a shard's responses, from whatever it knows of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from rlprm.batch import pad
from rlprm.core.implicit import Granularity
from rlprm.engine.combine import Measured, agreed
from rlprm.errors import ConfigError
from rlprm.records import JaggedShard, Shard, Stream
from rlprm.roles import Reduce, Request, Rollout, RowText
from rlprm.sources.measure import Measurement

OWN = ""  # the name of a source's own stream among what it returns


@runtime_checkable
class Engines(Protocol):
    """Generation engines that a source may ask; they rest while sources work."""

    def sample(self, requests: Sequence[Request]) -> list[list[Rollout]]:
        """The rollouts of each request, in the order of the requests."""
        ...

    def logprobs(self, tokens: Sequence[Sequence[int]], temperature: float) -> list[list[float]]:
        """log mu of each given token after its prefix, nats; the first entry of each is 0."""
        ...


@runtime_checkable
class Grader(Protocol):
    """The run's own verifier."""

    def outcomes(self, groups: Sequence[Sequence[Rollout]]) -> list[list[float | None]]:
        """The outcome of each rollout; None where the verifier failed or timed out."""
        ...


@runtime_checkable
class PolicyView(Protocol):
    """What a source on the policy's ranks may ask of the policy."""

    def entropy(self, shard: JaggedShard) -> Float[Tensor, " N"]:
        """Entropy (nats) of the distribution that each response token was drawn from; 0 on prompt tokens."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceContext:
    """Where a source lives: made once for it, on each of its ranks. What it did not ask for is None."""

    name: str  # of its stream
    model: str | None  # folder of its model
    learner: Any  # Learner of that model, where the section has learner settings
    passes: Any  # how often and in how many parts that learner goes over a batch
    tokenizer: Any  # of its model where it has one, else the policy's
    policy_tokenizer: Any
    temperature: float
    reduce: Reduce
    device: str
    dtype: str
    attention: str  # how attention is computed: sdpa, eager or flash_attention_2
    token_budget: int  # most tokens in one forward pass
    layout: str
    seed: int
    max_response_tokens: int
    engines: Engines | None = None
    grader: Grader | None = None
    policy: PolicyView | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorable:
    """What a source is given of one rank's responses. Flat tensors describe ``shard.tokens`` one by one."""

    shard: JaggedShard
    old: Float[Tensor, " N"]  # log pi_old, nats; 0 on prompt tokens
    ref: Float[Tensor, " N"] | None  # log pi_ref; None where the run has no reference
    texts: tuple[RowText, ...] | None  # one per row, for sources with `reads_text`
    step: int  # of the training loop

    @property
    def padded(self) -> Shard:
        """The shard as rows of equal length, with its masks."""
        return pad(self.shard)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Streams by output name (``""``: the source's own), what was measured of its quality, and other numbers."""

    streams: Mapping[str, Stream]
    measurement: Measurement | None
    metrics: Measured

    @classmethod
    def of(cls, stream: Stream, **metrics: float) -> Scores:
        """One stream, no measurement; ``metrics`` are the same on every rank."""
        return cls(streams={OWN: stream}, measurement=None, metrics=agreed(**metrics))


class ProcessSource(ABC):
    """Process rewards for responses: the base of every ``conf/source/*.yaml``.

    A subclass takes the context and its settings as keyword-only arguments, and says in class attributes what it needs
    from the run; the configuration check reads them before anything starts. All methods are collective over the ranks
    that hold the source. `score` runs before any update of the same batch and reads nothing but what it is given.

    >>> import torch
    >>> class Brevity(ProcessSource):
    ...     def __init__(self, context, *, price: float):
    ...         self.name, self.price = context.name, price
    ...     def score(self, given):
    ...         rows = given.padded
    ...         return Scores.of(Stream(rewards=-self.price * rows.response_mask, present=rows.response_mask))
    """

    reads_text: ClassVar[bool] = False  # wants Scorable.texts
    reads_reference: ClassVar[bool] = False  # wants log pi_ref
    reads_policy: ClassVar[bool] = False  # sits on the policy's ranks and asks context.policy
    engine: ClassVar[Literal["none", "rollout", "own"]] = (
        "none"  # rollout: the run's; own: of its own model, if it has one
    )
    measures: ClassVar[bool] = False  # returns a measurement: its quality is logged and it earns trust
    pays_steps: ClassVar[bool] = False  # needs a splitter that finds steps
    own_tokens: ClassVar[bool] = False  # re-tokenises text for its model, whose vocabulary need not be the policy's
    outputs: ClassVar[tuple[str, ...]] = ()  # streams besides its own
    stateful: ClassVar[bool] = False  # has something to save
    exportable: ClassVar[bool] = False  # can be written as a Hugging Face folder
    name: str

    @classmethod
    def check(cls, *, model: str | None, learner: bool, **settings: Any) -> None:
        """Refuse at start-up what cannot work. Sources without a model refuse one by default.

        Raises:
            ConfigError: with the setting, what was found and what to do.
        """
        if model is not None or learner:
            raise ConfigError(f"{cls.__name__} has no model; set model and learner to null")

    @classmethod
    def granularity(cls, **settings: Any) -> Granularity:
        """Where its stream has entries: each token, each step's last token, or the response's last token."""
        return "token"

    @classmethod
    def engine_tokens(cls, *, prompt: int, response: int, **settings: Any) -> int:
        """The most tokens that its own engine must hold at once, from the limits of the run's prompts and responses."""
        return prompt + response

    @abstractmethod
    def score(self, given: Scorable) -> Scores:
        """Its streams for these responses, detached."""

    def learn(self, given: Scorable) -> Measured:
        """Update from the batch, where the source learns at all."""
        return agreed()

    def save(self, folder: str) -> None:  # noqa: B027 - a hook: most sources have nothing to do here
        """Write its state (only where ``stateful``)."""

    def load(self, folder: str) -> None:  # noqa: B027 - a hook: most sources have nothing to do here
        """Read what :meth:`save` wrote."""

    def export(self, folder: str) -> str:
        """Write its model as a Hugging Face folder (only where ``exportable``)."""
        return folder

    def close(self) -> None:  # noqa: B027 - a hook: most sources have nothing to do here
        """Release what it holds."""


class OutputOf(ProcessSource):
    """A further output of another stream's source as a stream of its own: nothing is asked twice.

    ``streams.verdict.source.kind = {_target_: rlprm.sources.base.OutputOf, _partial_: true, of: process, output: verdict}``
    """

    def __init__(self, context: SourceContext, *, of: str, output: str) -> None:
        raise ConfigError(f"stream {context.name!r} is an output of {of!r} and has no process of its own")

    def score(self, given: Scorable) -> Scores:
        """Nobody asks it: the source that it names is asked.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("an output of another source is not scored by itself")

    @classmethod
    def granularity(cls, **settings: Any) -> Granularity:
        return "whole"
