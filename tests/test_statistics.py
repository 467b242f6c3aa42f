import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gadfly.statistics import Figure, mean, mean_difference, share

numbers = st.floats(-1e6, 1e6)


def test_wilson_interval_equals_its_formula_worked_by_hand():
    # 8 of 10, z = 1.959964: centre (0.8 + z²/20) / (1 + z²/10), half-width
    # z sqrt(0.16/10 + z²/400) / (1 + z²/10).
    figure = share([True] * 8 + [False] * 2)
    assert (figure.value, figure.n) == (0.8, 10)
    assert figure.low == pytest.approx(0.490162, abs=1e-6)
    assert figure.high == pytest.approx(0.943318, abs=1e-6)


def test_no_success_has_a_low_end_of_exactly_zero_and_all_a_high_end_of_one():
    assert share([False] * 5).low == 0
    assert share([True] * 5).high == 1
    assert share([False] * 5).high == pytest.approx(0.434482, abs=1e-6)


@given(st.lists(st.booleans(), min_size=1, max_size=50))
def test_a_share_lies_in_its_interval_and_the_interval_in_zero_to_one(cases):
    figure = share(cases)
    assert 0 <= figure.low <= figure.value <= figure.high <= 1


def test_t_interval_equals_its_formula_worked_by_hand():
    # 1 … 5: mean 3, variance 2.5, t(0.975, 4) = 2.776445, margin 2.776445 sqrt(2.5 / 5).
    figure = mean([1, 2, 3, 4, 5])
    assert (figure.value, figure.n) == (3, 5)
    assert figure.low == pytest.approx(3 - 1.963243, abs=1e-6)
    assert figure.high == pytest.approx(3 + 1.963243, abs=1e-6)


def test_one_value_says_nothing_about_the_spread():
    figure = mean([0.3])
    assert figure == Figure(0.3, 1, -math.inf, math.inf)
    assert json.loads(json.dumps(figure.as_record(), allow_nan=False)) == {
        "value": 0.3,
        "n": 1,
        "interval": [None, None],
    }


def test_equal_values_have_an_interval_of_exactly_no_width():
    # In floats the sum of 41 times 0.1 is not 41 times 0.1.
    assert mean([0.1] * 41) == Figure(0.1, 41, 0.1, 0.1)


@given(st.lists(numbers, min_size=2, max_size=30))
def test_a_mean_lies_in_its_interval_and_among_its_values(values):
    figure = mean(values)
    assert figure.low <= figure.value <= figure.high
    rounding = 1e-9
    assert min(values) - rounding <= figure.value <= max(values) + rounding


def test_paired_differences_cancel_what_both_share():
    a, b = [10.0, 200.0, 3000.0], [9.0, 198.0, 2997.0]
    # Differences 1, 2, 3: mean 2, variance 1, t(0.975, 2) = 4.302653, margin 4.302653 / sqrt(3).
    figure = mean_difference(a, b)
    assert figure.value == 2
    assert figure.high - figure.value == pytest.approx(2.484138, abs=1e-6)


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=20))
def test_swapping_the_sides_mirrors_the_difference(pairs):
    a, b = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    one, other = mean_difference(a, b), mean_difference(b, a)
    assert (one.value, one.low, one.high) == (-other.value, -other.high, -other.low)


@pytest.mark.parametrize("figure", [share, mean, lambda values: mean_difference(values, values)])
def test_no_case_is_an_error(figure):
    with pytest.raises(ValueError, match="at least one"):
        figure([])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_an_error_that_says_which(value):
    with pytest.raises(ValueError, match=f"value 1 is {value}"):
        mean([0.5, value])


def test_pairs_of_different_number_are_an_error():
    with pytest.raises(ValueError, match="2 and 1 values"):
        mean_difference([1.0, 2.0], [1.0])
