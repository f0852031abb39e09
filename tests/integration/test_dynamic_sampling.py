"""Prompts that teach nothing are sampled, counted and replaced; where none teaches, the run ends with an error."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from rlprm.batch import Row
from rlprm.errors import NoLearningSignal
from tests.integration.support import PRM, TRANSFORMERS, Done, train

pytestmark = pytest.mark.integration

# Two right of four, nothing else: with a model that is right a third to half of the time, most prompts are refused.
HALF = ("keep=accuracy_band", "keep.min_prompts=2", "keep.max_rounds=6", "keep.rule.low=0.5", "keep.rule.high=0.5")


@pytest.fixture(scope="module")
def banded(ray_once: None, model: str, tmp_path_factory: pytest.TempPathFactory) -> Done:
    return train(tmp_path_factory.mktemp("banded"), model, *PRM, *TRANSFORMERS, *HALF, "steps=2")


def groups(rows: Sequence[Row]) -> dict[int, list[Row]]:
    found: dict[int, list[Row]] = {}
    for row in rows:
        found.setdefault(row.group, []).append(row)
    return found


def test_only_prompts_inside_the_band_train(banded: Done) -> None:
    for rows in banded.rows:
        for group in groups(rows).values():
            right = sum(row.outcome or 0.0 for row in group)
            assert len({(row.train, row.fresh) for row in group}) == 1
            assert len({row.prompt_id for row in group}) == 1
            if group[0].train:
                assert right == 2
            else:  # kept beside them to measure the PRM on what was sampled first, unfiltered
                assert group[0].fresh


def test_missing_prompts_are_sampled_again(banded: Done) -> None:
    assert max(row["keep/rounds"] for row in banded.metrics) > 1
    for row in banded.metrics:
        assert 2 <= row["keep/prompts_kept"] <= 4
        assert row["keep/prompts_sampled"] > 4
        assert row["keep/rollouts_sampled"] == 4 * row["keep/prompts_sampled"]
        assert row["keep/frac_kept"] < 1


def test_what_was_filtered_counts_as_sampled(banded: Done) -> None:
    sampled = [row["keep/prompts_sampled"] for row in banded.metrics]
    assert banded.taken == sum(sampled)
    assert [row["training/rollouts_total"] for row in banded.metrics] == [4 * sampled[0], 4 * sum(sampled)]


def test_the_prm_is_measured_on_the_first_round_alone(banded: Done) -> None:
    for row, rows in zip(banded.metrics, banded.rows, strict=True):
        fresh = [each for each in rows if each.fresh]
        assert len(fresh) == 16  # 4 prompts of 4, before filtering
        assert row["prm/fresh_rows"] == 16
        assert row["keep/outcome_mean_fresh"] == pytest.approx(sum(each.outcome or 0.0 for each in fresh) / 16)
        assert row["select/rows_in"] == sum(each.train for each in rows)


def test_a_run_that_can_keep_nothing_ends_with_an_error(ray_once: None, model: str, tmp_path: Path) -> None:
    impossible = ("keep=accuracy_band", "keep.min_prompts=2", "keep.max_rounds=3", "keep.rule.low=0.3",
                  "keep.rule.high=0.4")  # fmt: skip
    with pytest.raises(NoLearningSignal, match="kept 0 of 12 prompts after 3 rounds, expected at least 2; widen the"):
        train(tmp_path, model, "method=outcome_rloo", *TRANSFORMERS, *impossible)
