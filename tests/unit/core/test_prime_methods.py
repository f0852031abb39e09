"""PRIME's and iStar's methods as their YAMLs compose them, on the worked example; what each number comes from is beside it."""

from __future__ import annotations

import pytest

from rlprm.config import TrainConfig, validated
from rlprm.core.credit import CriticPlan, credit, outcome_stream
from rlprm.core.implicit import drop_last
from rlprm.core.reduce import Identity
from rlprm.run.factories import plans
from tests.contract.options import values
from tests.unit.core.worked import close, example, off_response, on_response, process_stream

# y1 = [0.2, -0.1], y2 = [0.1, 0.3, -0.2], y3 = [0.4]; outcomes 1, 0, 1; each token is a step
GOLDEN = {
    # r_o + suffix sums
    "prime_reinforce": [[1.1, 0.9], [0.2, 0.1, -0.2], [1.4]],
    # outcome z 0.577349, -1.154699, 0.577349; token means 0.05, 0.066667, 0.4 with mean 0.172222 and std_b 0.197437:
    # tokens 0.140691, -1.378771 | -0.365796, 0.647179, -1.885258 | 1.153666, then suffix sums
    "prime_grpo": [[-0.660731, -0.801422], [-2.758574, -2.392778, -3.039957], [1.731015]],
    # r_o minus the sum of what came before the token
    "prime_value": [[1.0, 0.8], [0.0, -0.1, -0.4], [1.0]],
    # the algorithms reference's golden row (last token dropped, factors 5 and 5, whitened)
    "prime_verl_recipe": [[1.220616, 0.554827], [-0.292546, -0.413599, -1.624125], [0.554827]],
    # the same outcome z, plus z-scores over all six steps:
    # 0.359720, -0.935272 | -0.071944, 0.791384, -1.366936 | 1.223048
    "istar_as_written": [[0.937069, -0.357923], [-1.226643, -0.363315, -2.521635], [1.800397]],
    # outcomes minus 2/3; steps over the largest return 0.4: 0.5, -0.25 | 0.25, 0.75, -0.5 | 1, minus their mean 0.291667
    "istar_as_released": [[0.541667, -0.208333], [-0.708333, -0.208333, -1.458333], [1.041667]],
}


def composed(method):
    config = validated(TrainConfig, values("train", [f"method={method}", "model.path=somewhere"]))
    assert isinstance(config, TrainConfig)
    return config


@pytest.mark.parametrize("method", GOLDEN)
def test_method_on_the_worked_example(method):
    shard, config = example(), composed(method)
    process = process_stream(shard)
    kind = config.streams["process"].source.kind
    paid = drop_last(process, shard.response_mask) if kind["last_token"] == "drop" else process
    found = credit(
        shard,
        {"outcome": outcome_stream(shard), "process": paid},
        plans(config),
        Identity(),
        whiten=config.whiten,
        trust={},
    )
    close(off_response(found.advantages.total, shard), GOLDEN[method], 3e-6)


def test_prime_ppo_adds_process_rewards_to_what_the_critic_explains():
    shard, config = example(), composed("prime_ppo")
    assert config.critic is not None
    found = credit(
        shard,
        {"outcome": outcome_stream(shard), "process": process_stream(shard)},
        plans(config),
        Identity(),
        whiten="none",
        trust={},
        values=on_response(shard, [[0.5, 0.6], [0.1, 0.2, 0.3], [0.7]]),
        critic=CriticPlan(gamma=1.0, lam=0.5),
    )
    # rewards over their range 0.4, the outcome on the last token: 0.5, 0.75 | 0.25, 0.75, -0.5 | 2
    # y1: 0.75 - 0.6 = 0.15; 0.5 + 0.6 - 0.5 + 0.5 * 0.15 = 0.675
    # y2: -0.5 - 0.3 = -0.8; 0.75 + 0.3 - 0.2 - 0.4 = 0.45; 0.25 + 0.2 - 0.1 + 0.225 = 0.575; y3: 2 - 0.7 = 1.3
    close(off_response(found.advantages.total, shard), [[0.675, 0.15], [0.575, 0.45, -0.8], [1.3]], 3e-6)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("istar_as_written", {"reference": "policy", "granularity": "step", "update": "after", "pooling": "sum"}),
        ("istar_as_released", {"reference": "policy", "granularity": "step", "update": "never", "loss": None}),
        (
            "prime_verl_recipe",
            {"reference": "initial", "granularity": "token", "update": "before", "last_token": "drop"},
        ),
    ],
)
def test_method_names_its_own_prm(method, settings):
    source = composed(method).streams["process"].source
    assert {key: source.kind[key] for key in settings} == settings
    assert (source.learner is None) == (settings["update"] == "never")


def test_a_recipes_own_settings_reach_the_prm_of_a_method():
    found = values("train", ["recipe=chain_arithmetic_cpu", "method=istar_as_written"])
    source = found["streams"]["process"]["source"]
    assert source["kind"]["beta"] == 2.0  # the recipe's
    assert source["kind"]["loss"]["_target_"].endswith(".dpo")  # the method's
