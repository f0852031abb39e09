"""What `rlprm plan` says of a learner's memory against real workers on this machine's CPU: within 15 % at two sizes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from rlprm.cli.compose import composed
from rlprm.config import TrainConfig, validated
from rlprm.paths import recipes_dir
from rlprm.planning.arithmetic import arithmetic
from rlprm.planning.hardware import this_machine
from rlprm.planning.measure import measured, predicted
from rlprm.planning.plan import shapes_for
from rlprm.planning.processes import layout

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

TOLERANCE = 0.15
SIZES = {  # hidden, layers, heads, heads of keys, width of the MLP: 25 and 94 million parameters
    "25M": (384, 8, 6, 2, 1024),
    "94M": (768, 11, 12, 4, 2048),
}
FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models with random weights and a vocabulary of 32,000; tied embeddings."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    found = {}
    for name, (hidden, layers, heads, keys, width) in SIZES.items():
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=32_000, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=keys, intermediate_size=width, max_position_embeddings=512, tie_word_embeddings=True,
            bos_token_id=2, eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
        folder = tmp_path_factory.mktemp(name)
        Qwen2ForCausalLM(config).save_pretrained(folder)
        for file in FILES:
            shutil.copy(recipes_dir() / "chain_arithmetic_cpu" / "model" / file, folder)
        found[name] = folder
    return found


def compared(folder: Path, role: Any, logs: Path, *overrides: str) -> tuple[list[int], int]:
    """The highest resident bytes of each rank above an idle one, and what the plan says."""
    config = validated(
        TrainConfig,
        composed(
            "train",
            ["recipe=chain_arithmetic_cpu", f"model.path={folder}", "max_response_tokens=96", "data.max_prompt_tokens=32",
             "policy.token_budget=512", "streams.process.source.learner.token_budget=512",
             "streams.process.source.learner.mini_batches=1", "prompts_per_step=2", "responses_per_prompt=2",
             "keep.min_prompts=2", "rollout.engine.max_num_seqs=4", *overrides],
        ).values,
    )  # fmt: skip
    batch = arithmetic(config)
    where = layout(config, shapes_for(config, {}), this_machine(1), batch)
    process = next(each for each in where.processes if each.role == {"engine": "rollout engine"}.get(role, role))
    return [each.peak for each in measured(config, role, logs)], predicted(process)


CASES = [
    ("25M", "policy", ("placement.policy_ranks=2",)),
    # two micro-batches for an optimizer step
    pytest.param("25M", "policy", ("policy.token_budget=256",), marks=pytest.mark.long),
    ("94M", "policy", ()),
    pytest.param("25M", "prm", (), marks=pytest.mark.long),
    pytest.param("94M", "prm", (), marks=pytest.mark.long),
]


@pytest.mark.parametrize(("size", "role", "overrides"), CASES)
def test_a_learners_increment_is_predicted(
    folders: dict[str, Path], size: str, role: str, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    found, expected = compared(folders[size], role, tmp_path, *overrides)
    for each in found:
        print(f"{size} {role} {overrides}: {each / 1e6:.0f} MB, predicted {expected / 1e6:.0f} MB")
        assert abs(expected - each) < TOLERANCE * each


@pytest.mark.long  # with the others over a minute
@pytest.mark.parametrize("size", SIZES)
def test_an_engines_increment_is_predicted(folders: dict[str, Path], size: str, tmp_path: Path) -> None:
    (found,), expected = compared(folders[size], "engine", tmp_path)
    print(f"{size} engine: {found / 1e6:.0f} MB, predicted {expected / 1e6:.0f} MB")
    assert abs(expected - found) < TOLERANCE * found
