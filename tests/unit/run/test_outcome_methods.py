"""What the outcome-side methods ask of a run, as their YAMLs compose."""

from __future__ import annotations

import pytest

from rlprm.cli.compose import composed
from rlprm.config import TrainConfig, validated
from rlprm.errors import ConfigError
from rlprm.run import factories


def config(*overrides: str) -> TrainConfig:
    return validated(TrainConfig, composed("train", ["model.path=somewhere", *overrides]).values)


def test_a_greedy_response_is_sampled_where_a_stream_measures_from_it_and_nowhere_else():
    assert factories.needs_greedy(config("method=outcome_remax"))
    assert factories.needs_greedy(config("method=outcome_remax", "responses_per_prompt=1"))  # needs no sibling
    assert not factories.needs_greedy(config("method=outcome_rloo"))
    assert not factories.needs_greedy(config("method=dapo"))  # a stream without pieces


def test_only_the_outcome_can_be_measured_from_a_greedy_response():
    with pytest.raises(ConfigError, match="only the outcome is known"):
        config("normalizer@streams.process.normalizer=greedy")


def test_streams_that_are_summed_into_the_outcome_have_no_credit_of_their_own():
    for method, taken in (("dapo", "overlong"), ("outcome_rloo_kl", "kl")):
        made = config(f"method={method}")
        assert list(made.streams) == ["outcome", taken]
        assert [plan.name for plan in factories.plans(made)] == ["outcome"]
    assert factories.needs_reference(config("method=outcome_rloo_kl"))
    assert not factories.needs_reference(config("method=dapo"))


@pytest.mark.parametrize(
    ("method", "surrogate", "aggregation"),
    [
        ("dapo", "ppo_clip", "token-mean"),
        ("gspo", "gspo", "seq-mean-token-mean"),
        ("gspo_token", "gspo_token", "seq-mean-token-mean"),
        ("cispo", "cispo", "token-mean"),
        ("sapo", "sapo", "seq-mean-token-mean"),
        ("drpo", "reinforce", "seq-mean-token-mean"),
    ],
)
def test_methods_bring_their_policy_loss(method, surrogate, aggregation):
    loss = config(f"method={method}").policy_loss
    assert loss.surrogate["_target_"].rpartition(".")[2] == surrogate
    assert loss.aggregation == aggregation
    assert (loss.trust_region is not None) == (method == "drpo")
    # the command line has the last word
    own = config(f"method={method}", "policy_loss=grpo").policy_loss  # of the aggregation that drpo needs
    assert own.surrogate["_target_"].rpartition(".")[2] == "ppo_clip"


def test_overlong_fits_every_length_limit():
    for limit in (16, 4096):
        kind = config("method=dapo", f"max_response_tokens={limit}").streams["overlong"].source.kind
        assert kind["max_length"] == limit
    with pytest.raises(ConfigError, match=r"streams\.overlong\.source: overlong has"):
        config("method=dapo", "streams.overlong.source.kind.buffer=0.0")


def test_dapo_takes_every_prompt_or_none():
    made = config("method=dapo", "prompts_per_step=12")
    assert made.keep.min_prompts == 12
    assert made.keep.rule["_target_"] == "rlprm.data.keep.mixed"
