"""From a validated configuration to what an actor builds: plain values, no process, no model."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest

from rlprm.config import TrainConfig, validated
from rlprm.core.credit import OUTCOME
from rlprm.data.stored import TokenExample
from rlprm.errors import ConfigError
from rlprm.run import factories
from rlprm.run.build import made
from tests.contract import options as listing


def config(*overrides: str) -> TrainConfig:
    return validated(TrainConfig, listing.values("train", ["model.path=somewhere", *overrides]))


def test_reference_is_built_only_where_something_measures_from_it():
    assert factories.needs_reference(config("method=prime_as_written"))
    assert factories.needs_reference(config("method=outcome_reinforce_pp"))  # a kl stream
    assert factories.needs_reference(config("method=outcome_rloo", "policy_loss.kl_weight=0.1"))
    assert not factories.needs_reference(config("method=outcome_rloo"))
    assert not factories.needs_reference(config("method=oracle"))  # a source without a model


def test_plans_are_the_streams_in_their_order():
    plans = factories.plans(config("method=prime_as_written", "streams.process.weight=0.5"))
    assert [(plan.name, plan.weight) for plan in plans] == [(OUTCOME, 1.0), ("process", 0.5)]
    assert plans[0].normalizer.keywords["centre"] == "leave_one_out"
    assert plans[1].normalizer.keywords["centre"] == "token_mean_loo"
    assert plans[1].estimator.keywords == {"gamma": 1.0}


def test_pieces_travel_to_other_processes():
    for plan in factories.plans(config()):
        assert pickle.loads(pickle.dumps(plan)).normalizer.keywords == plan.normalizer.keywords


def test_a_piece_without_settings_is_the_function_itself():
    # a critic recognises its estimator by identity
    from rlprm.core.estimators import none

    assert factories.plans(config("method=ppo"))[0].estimator is none
    assert made({"_target_": "rlprm.core.estimators.none", "_partial_": True}) is none


def test_updates_and_passes_are_those_of_the_section():
    given = config("steps=10", "policy.epochs=2", "policy.mini_batches=4", "seed=7", "policy.token_budget=99")
    assert factories.updates(given, given.policy) == 80
    found = factories.passes(given.policy, given.seed)
    assert (found.epochs, found.mini_batches, found.token_budget, found.layout, found.seed) == (2, 4, 99, "padded", 7)


def test_learner_settings_say_what_the_section_says():
    given = config("policy.lr=0.5", "policy.betas=[0.8,0.9]", "policy.zero_stage=3", "model.dtype=bfloat16")
    found = factories.learner_settings(given, given.policy, total_steps=80)
    assert (found.lr, found.betas, found.zero_stage, found.total_steps) == (0.5, (0.8, 0.9), 3, 80)
    assert (found.dtype, found.device) == ("bfloat16", "cpu")
    section = given.policy.model_dump()
    for name in ("eps", "weight_decay", "schedule", "warmup", "max_grad_norm", "offload", "token_budget", "layout"):
        assert getattr(found, name) == section[name]


def test_prm_learns_with_its_own_section():
    given = config("streams.process.source.learner.lr=0.25")
    learner = given.streams["process"].source.learner
    assert factories.learner_settings(given, learner, total_steps=1).lr == 0.25
    assert given.policy.lr != 0.25


def test_rule_source_is_made_with_its_name_and_settings(monkeypatch):
    monkeypatch.setattr(factories, "load_tokenizer", lambda path: None)
    source = factories.source(config("method=oracle", "streams.process.source.kind.wrong=-2.0"), "process", {}, None)
    assert source.name == "process"
    assert source._wrong == -2.0
    assert not source.stateful


class Tokenizer:
    eos_token_id = 9

    def __call__(self, text: str, *, add_special_tokens: bool):
        assert not add_special_tokens, "a second BOS would stand before the response"
        return {"input_ids": [ord(letter) for letter in text]}


def render(question: str) -> tuple[str, tuple[int, ...]]:
    return question, (1, *(ord(letter) for letter in question))


def test_examples_become_prompt_tokens_and_a_response_with_one_eos():
    found = factories.tokenized([("a", "bc"), ("d", "")], render, Tokenizer())
    assert found == [((1, 97), (98, 99, 9)), ((1, 100), (9,))]


def test_examples_that_teach_nothing_are_refused():
    with pytest.raises(ConfigError, match="no examples to learn from"):
        factories.tokenized([], render, Tokenizer())
    with pytest.raises(ConfigError, match="no EOS token, so the model would never learn to stop"):
        factories.tokenized([("a", "b")], render, SimpleNamespace(eos_token_id=None))


def test_stored_examples_keep_their_tokens():
    examples = [TokenExample(prompt=(1, 2), response=(3, 0))]
    assert factories.tokenized(lambda: examples, None, SimpleNamespace(eos_token_id=None)) == [((1, 2), (3, 0))]
