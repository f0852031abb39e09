from __future__ import annotations

import pytest
import torch

from rlprm.core.metric_table import METRICS
from rlprm.core.metrics import Max, Mean, Min, Sum, check_name, merged, numbers
from rlprm.errors import ConfigError


def test_means_merge_by_count_and_not_by_mean():
    # 1, 2, 3 and 10: 16/4 = 4, where the mean of means would be 6
    parts = [{"a": Mean.of(torch.tensor([1.0, 2.0, 3.0]))}, {"a": Mean.of(torch.tensor([10.0]))}]
    assert numbers(merged(parts)) == {"a": 4.0}


def test_masked_entries_are_not_read():
    values, where = torch.tensor([1.0, torch.nan, 3.0]), torch.tensor([True, False, True])
    assert (Mean.of(values, where).value, Max.of(values, where).value, Min.of(values, where).value) == (2.0, 3.0, 1.0)


def test_nothing_measured_is_left_out():
    empty = torch.zeros(0)
    parts = {"a": Mean.of(empty), "b": Max.of(empty), "c": Min.of(empty), "d": Sum(0.0)}
    assert numbers(parts) == {"d": 0.0}
    assert merged([parts, {"b": Max(2.0), "c": Min(2.0)}])["b"] == Max(2.0)


def test_a_name_measured_in_two_ways_is_refused():
    with pytest.raises(ConfigError, match="metric a is a Sum and a Max"):
        merged([{"a": Sum(1.0)}, {"a": Max(1.0)}])


@pytest.mark.parametrize(
    "name",
    [
        "actor/pg_loss", "adv/outcome/share", "reward/prime-prm/frac_zero_std", "timing_s/collect",
        "val-core/gsm8k/outcome/mean@8", "training/rollout_probs_diff_max", "prm/auc_surprisal", "critic/vf_loss",
    ],
)  # fmt: skip
def test_listed_names_pass(name):
    assert check_name(name).formula


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("actor/pgloss", "actor/pg_loss"),
        ("val-core/gsm8k/outcome/mean@k", "val-core/{source}/{metric}/mean@{n}"),
        ("adv/outcome/shared", "adv/{stream}/share"),
        ("timing_s/a/b", "timing_s/{stage}"),
    ],
)
def test_other_names_are_refused_with_the_nearest(name, nearest):
    with pytest.raises(ConfigError) as caught:
        check_name(name)
    assert nearest in str(caught.value)


def test_the_table_lists_each_name_once_and_completely():
    names = [spec.name for spec in METRICS]
    assert len(set(names)) == len(names)
    for spec in METRICS:
        assert spec.unit
        assert spec.formula
        assert spec.reduction in ("mean", "sum", "max", "min", "global", "driver")
        assert check_name(spec.name.replace("{n}", "8").replace("{", "").replace("}", "")).name
