import math
import time

import numpy as np
import pytest
from scipy.optimize import minimize

from gadfly.analysis.win_rates import length_controlled_win_rate, win_rate

VALUES = {"win": 1.0, "tie": 0.5, "loss": 0.0}
MIRROR = {"win": "loss", "tie": "tie", "loss": "win"}


def oracle(outcomes, differences):
    """The same figure by another way: Nelder-Mead from 0, without derivatives, on the loss spelled out."""
    values = np.array([VALUES[result] for result in outcomes])
    lengths = np.tanh(np.array(differences) / np.std(differences, ddof=1))

    def loss(weights):
        theta, phi = weights
        p = 1 / (1 + np.exp(-(theta + phi * lengths)))
        entropy = -(values * np.log(p) + (1 - values) * np.log(1 - p)).sum()
        return entropy + 0.05 * phi**2

    found = minimize(loss, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12})
    return 1 / (1 + math.exp(-found.x[0]))


def judged(n, preference_for_length, *, seed=0, mean=250, quality=0.0):
    """Outcomes of a judge whose logit is `quality` + `preference_for_length` * tanh(difference / std)."""
    rng = np.random.default_rng(seed)
    differences = rng.normal(mean, 300, n).round().astype(int)
    logits = quality + preference_for_length * np.tanh(differences / differences.std(ddof=1))
    wins = rng.random(n) < 1 / (1 + np.exp(-logits))
    return ["win" if won else "loss" for won in wins], differences.tolist()


def test_a_tie_is_half_a_win():
    figure = win_rate(["win", "tie", "tie", "loss", "win"])
    assert (figure.value, figure.n) == (0.6, 5)
    assert figure.low <= 0.6 <= figure.high


def test_the_interval_of_a_win_rate_is_about_two_standard_errors_each_side():
    # sqrt(0.6 * 0.4 / 400) = 0.0245.
    figure = win_rate(["win"] * 240 + ["loss"] * 160)
    assert figure.high - figure.low == pytest.approx(2 * 1.96 * 0.0245, rel=0.1)


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize(("result", "value"), VALUES.items())
def test_equal_outcomes_are_the_figure_whatever_the_lengths(result, value, count):
    outcomes = [result] * count
    controlled = length_controlled_win_rate(outcomes, list(range(-3, count - 3)))
    assert controlled == win_rate(outcomes)
    assert (controlled.value, controlled.low, controlled.high) == (value, value, value)


@pytest.mark.parametrize("difference", [0, 120])
def test_equal_differences_leave_the_raw_win_rate(difference):
    outcomes = ["win"] * 5 + ["tie"] * 2 + ["loss"] * 4
    assert length_controlled_win_rate(outcomes, [difference] * 11) == win_rate(outcomes)


def test_balanced_lengths_worked_by_hand():
    # Differences 1 and -1, as many wins in each: phi = 0, so theta is the logit of the raw 0.75.
    outcomes = ["win", "win", "win", "loss"] * 2
    figure = length_controlled_win_rate(outcomes, [1] * 4 + [-1] * 4)
    assert (figure.value, figure.n) == (pytest.approx(0.75), 8)


def test_a_saturated_model_worked_by_hand():
    # As many parameters as lengths, so without the ridge each P would be its share: 0.8 where A is
    # longer (6 in 10 prompts) and 0.4 where it is shorter. The lengths are opposite, so theta is the
    # mean of both logits, log(4 * 2/3) / 2. The ridge moves it by less than 0.1 / 1000.
    outcomes = (["win"] * 480 + ["loss"] * 120) + (["win"] * 160 + ["loss"] * 240)
    value = length_controlled_win_rate(outcomes, [500] * 600 + [-500] * 400).value
    assert value == pytest.approx(1 / (1 + math.sqrt(3 / 8)), abs=1e-4)
    assert win_rate(outcomes).value == 0.64


def test_a_judge_who_prefers_length_alone_is_seen_through():
    for seed in range(3):
        outcomes, differences = judged(500, preference_for_length=3, seed=seed)
        assert win_rate(outcomes).low > 0.65
        controlled = length_controlled_win_rate(outcomes, differences)
        assert controlled.low < 0.5 < controlled.high
        assert controlled.value == pytest.approx(0.5, abs=0.07)


def test_a_better_answer_stays_better_when_it_is_also_shorter():
    outcomes, differences = judged(800, preference_for_length=2, mean=-250, quality=1.0)
    assert win_rate(outcomes).value < 0.5
    figure = length_controlled_win_rate(outcomes, differences)
    assert figure.value == pytest.approx(1 / (1 + math.exp(-1)), abs=0.06)


@pytest.mark.parametrize("n", [2, 30, 500])
def test_length_that_decides_every_outcome_gives_a_finite_figure_nearer_to_one_half(n):
    _, differences = judged(n, 0)
    outcomes = ["win" if difference > 0 else "loss" for difference in differences]
    outcomes[:2], differences[:2] = ["win", "loss"], [400, -400]
    raw, figure = win_rate(outcomes), length_controlled_win_rate(outcomes, differences)
    assert abs(figure.value - 0.5) <= abs(raw.value - 0.5) + 1e-9
    assert 0 <= figure.low <= figure.value <= figure.high <= 1


@pytest.mark.parametrize("seed", range(8))
def test_the_figure_equals_a_slow_minimiser_of_the_same_loss(seed):
    rng = np.random.default_rng(seed)
    outcomes, differences = judged(
        int(rng.integers(3, 200)), rng.normal(0, 3), seed=seed, mean=rng.normal(0, 400)
    )
    outcomes[:2] = ["win", "tie"]
    figure = length_controlled_win_rate(outcomes, differences)
    assert figure.value == pytest.approx(oracle(outcomes, differences), abs=1e-6)


@pytest.mark.parametrize("seed", range(2))
def test_swapping_the_models_mirrors_both_figures(seed):
    outcomes, differences = judged(25, preference_for_length=2, seed=seed)
    outcomes[::4] = ["tie"] * 7
    mirrored, opposite = [MIRROR[result] for result in outcomes], [-difference for difference in differences]
    for one, other in (
        (win_rate(outcomes), win_rate(mirrored)),
        (length_controlled_win_rate(outcomes, differences), length_controlled_win_rate(mirrored, opposite)),
    ):
        assert one.value == pytest.approx(1 - other.value)
        assert (one.low, one.high) == (pytest.approx(1 - other.high), pytest.approx(1 - other.low))


def test_the_unit_of_length_does_not_matter():
    outcomes, differences = judged(40, preference_for_length=2)
    figure = length_controlled_win_rate(outcomes, differences)
    longer = length_controlled_win_rate(outcomes, [6 * difference for difference in differences])
    assert (longer.value, longer.low) == (pytest.approx(figure.value), pytest.approx(figure.low))


def test_lengths_of_two_sizes_that_decide_all_are_seen_through_in_part():
    outcomes = ["win"] * 80 + ["loss"] * 20
    figure = length_controlled_win_rate(outcomes, [300] * 80 + [-300] * 20)
    assert figure.value == pytest.approx(0.67, abs=0.005)


def test_one_outlier_among_many_wins_converges():
    outcomes = ["win"] * 999 + ["loss"]
    figure = length_controlled_win_rate(outcomes, [*range(1, 1000), -100_000])
    assert 0.5 < figure.value <= 1


def test_five_hundred_prompts_with_their_interval_take_less_than_two_seconds():
    outcomes, differences = judged(500, preference_for_length=3)
    start = time.process_time()
    length_controlled_win_rate(outcomes, differences)
    assert time.process_time() - start < 2


def test_no_outcome_or_a_missing_length_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        win_rate([])
    with pytest.raises(ValueError, match="0 outcomes and 0 length differences"):
        length_controlled_win_rate([], [])
    with pytest.raises(ValueError, match="2 outcomes and 1 length differences"):
        length_controlled_win_rate(["win", "loss"], [3])
