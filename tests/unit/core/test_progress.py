"""Success of the best of K and progress, worked out by hand."""

from __future__ import annotations

from itertools import product

import pytest

from rlprm.core.progress import progress, success_of_best, tried_steps
from rlprm.errors import ConfigError


def test_best_of_two_of_four_counts_the_pairs_with_a_success():
    # one success among four: of the 6 pairs, the 3 without it fail
    assert success_of_best([0.0, 1.0, 0.0, 0.0], 2) == 0.5
    # two successes: only 1 of 6 pairs fails
    assert success_of_best([1.0, 0.0, 1.0, 0.0], 2) == pytest.approx(5 / 6)
    # pass@4 of 16 with 3 right (golden number of the reference): 1 - C(13,4)/C(16,4) = 1 - 715/1820
    assert success_of_best([1.0] * 3 + [0.0] * 13, 4) == pytest.approx(0.607143, abs=5e-7)


def test_outcomes_between_0_and_1_are_averaged_over_subsets_too():
    # failures 1/2, 1/4, 1: pairs 1/8, 1/2, 1/4, mean 7/24
    assert success_of_best([0.5, 0.75, 0.0], 2) == pytest.approx(1 - 7 / 24)


@pytest.mark.parametrize("best_of", [1, 2, 3])
def test_it_is_unbiased_and_the_plain_formula_is_not(best_of):
    chance, samples = 0.3, 3
    expected, plain = 0.0, 0.0
    for outcomes in product([0.0, 1.0], repeat=samples):
        weight = 1.0
        for outcome in outcomes:
            weight *= chance if outcome else 1 - chance
        found = success_of_best(outcomes, best_of)
        assert found is not None
        expected += weight * found
        plain += weight * (1 - (1 - sum(outcomes) / samples) ** best_of)
    assert expected == pytest.approx(1 - (1 - chance) ** best_of)
    if best_of > 1:
        assert plain < expected - 0.01


def test_fewer_outcomes_than_k_say_nothing():
    assert success_of_best([1.0], 2) is None
    assert success_of_best([], 1) is None
    with pytest.raises(ConfigError, match="best_of is 0"):
        success_of_best([1.0], 0)


def test_progress_is_the_difference_and_sums_to_outcome_minus_start():
    #        Q_0   Q_1   Q_2   Q_3=outcome
    table = [0.25, 0.50, 0.125, 1.0]
    assert progress(table) == [0.25, -0.375, 0.875]
    assert sum(x for x in progress(table) if x is not None) == table[-1] - table[0]


def test_an_absent_value_takes_both_neighbours_with_it():
    assert progress([0.25, None, 0.5, 1.0]) == [None, None, 0.5]
    assert progress([0.5, None]) == [None]
    assert progress([0.5]) == []


def test_tried_steps_are_spread_evenly_and_end_with_the_last():
    assert tried_steps(10, 1) == [4, 9]
    assert tried_steps(10, 3) == [1, 4, 6, 9]
    assert tried_steps(3, 2) == tried_steps(3, 7) == [0, 1, 2]
    assert tried_steps(0, None) == []
    with pytest.raises(ConfigError, match="at_most is 0"):
        tried_steps(3, 0)
