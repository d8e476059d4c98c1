"""The accountant against closed forms, Opacus and dp-accounting."""

from __future__ import annotations

import math

import pytest

from fedhds.privacy.accountant import Cost, calibrate, epsilon_of
from fedhds.privacy.mechanisms import calibrate_noise, gaussian_epsilon

# Costs, delta and epsilon by dp-accounting 0.6.0: PLDAccountant with add-or-remove-one, PoissonSampledDpEvent of
# GaussianDpEvent, self-composed. It is no dependency, as it pins an old attrs; with it, the last test computes them.
GOLDEN = [
    ([Cost(0.62, 32 / 700, 66)], 1 / 7000, 6.63360703475221),
    ([Cost(1.63, 32 / 700, 66)], 1 / 7000, 0.8559023023427529),
    ([Cost(1.46, 128 / 5000, 118)], 1 / 50000, 0.8649361666938499),
    ([Cost(1.0, 0.01, 1000)], 1e-5, 1.8282436455855091),
    ([Cost(5.0, steps=7), Cost(1.0, 0.05, 200)], 1e-5, 5.320384898765511),
    ([Cost(0.8, 0.3, 20), Cost(3.0, 0.1, 50)], 1e-6, 15.794087262296912),
]
# Opacus states the upper bound of its numerical errors: 0.01 of epsilon to either side.
_ERROR = 0.025


@pytest.mark.parametrize(("costs", "delta", "epsilon"), GOLDEN)
def test_epsilon_is_that_of_dp_accounting_and_never_below(costs: list[Cost], delta: float, epsilon: float) -> None:
    assert epsilon - 1e-3 <= epsilon_of(costs, delta=delta) <= epsilon + _ERROR


def test_without_sampling_it_is_the_closed_form() -> None:
    costs = [Cost(2.0, steps=3), Cost(4.0)]
    mu = math.sqrt(3 / 4 + 1 / 16)
    assert epsilon_of(costs, delta=1e-5) == pytest.approx(
        gaussian_epsilon(noise_multiplier=1 / mu, delta=1e-5), rel=1e-12
    )
    assert epsilon_of([], delta=1e-5) == 0
    assert epsilon_of([Cost(2.0, steps=0)], delta=1e-5) == 0


def test_sampling_every_row_is_no_sampling() -> None:
    # By the other way to compute it: a rate just below 1 is composed numerically.
    exact = epsilon_of([Cost(2.0, steps=3)], delta=1e-5)
    assert exact <= epsilon_of([Cost(2.0, 1 - 1e-9, 3)], delta=1e-5) <= exact + _ERROR


def test_it_is_opacus_own_epsilon() -> None:
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(1.1, 0.02, 300)]
    assert epsilon_of([Cost(1.1, 0.02, 100), Cost(1.1, 0.02, 200)], delta=1e-5) == accountant.get_epsilon(1e-5)


def test_one_release_without_noise_has_no_guarantee() -> None:
    assert epsilon_of([Cost(0.0), Cost(1.0, 0.1, 5)], delta=1e-5) == math.inf
    assert epsilon_of([Cost(0.0, 0.1, 5)], delta=1e-5) == math.inf


def test_where_the_numerical_way_ends_a_looser_bound_holds() -> None:
    """A delta beyond the precision of doubles; Renyi's bound is above the exact value for no sampling at all."""
    bound = epsilon_of([Cost(1.0, 0.01, 1000)], delta=1e-15)
    assert (
        epsilon_of([Cost(1.0, 0.01, 1000)], delta=1e-9)
        < bound
        < gaussian_epsilon(noise_multiplier=1.0, delta=1e-15, releases=1000)
    )


@pytest.mark.parametrize(
    ("cost", "dp_accounting"),
    [(Cost(1.0, 0.04, 60, True), 3.007791377998906), (Cost(2.0, 0.1, 30, True), 2.2324139502432883)],
)
def test_a_row_in_anothers_place_costs_more_than_one_left_out(cost: Cost, dp_accounting: float) -> None:
    """By dp-accounting with replace-one, which is tighter than the group of two that is taken here."""
    single = epsilon_of([Cost(cost.noise_multiplier, cost.sample_rate, cost.steps)], delta=1e-5)
    assert single < dp_accounting <= epsilon_of([cost], delta=1e-5) <= 3 * single
    # Without sampling, the sum moves by twice the norm.
    assert epsilon_of([Cost(2.0, replaced=True)], delta=1e-5) == gaussian_epsilon(noise_multiplier=1.0, delta=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [1.0, pytest.param(8.0, marks=pytest.mark.long)])
def test_calibrated_noise_keeps_to_epsilon_and_less_does_not(epsilon: float) -> None:
    spent = [Cost(10.0)]
    noise = calibrate(epsilon=epsilon, delta=1e-5, sample_rate=32 / 700, steps=66, spent=spent)
    assert noise is not None
    assert epsilon_of([*spent, Cost(noise, 32 / 700, 66)], delta=1e-5) <= epsilon
    assert epsilon_of([*spent, Cost(0.99 * noise, 32 / 700, 66)], delta=1e-5) > epsilon


def test_calibration_without_sampling_is_the_closed_form() -> None:
    noise = calibrate(epsilon=2.0, delta=1e-5, sample_rate=1.0, steps=4)
    assert noise == pytest.approx(calibrate_noise(epsilon=2.0, delta=1e-5, releases=4), rel=0.006)


def test_no_noise_is_enough_where_epsilon_is_spent() -> None:
    assert calibrate(epsilon=1.0, delta=1e-5, sample_rate=0.1, steps=5, spent=[Cost(2.0)]) is None


@pytest.mark.long
@pytest.mark.parametrize(("costs", "delta", "epsilon"), GOLDEN)
def test_golden_numbers_are_what_dp_accounting_says(costs: list[Cost], delta: float, epsilon: float) -> None:
    accounting = pytest.importorskip("dp_accounting", reason="pip install --no-deps dp-accounting dm-tree")
    accountant = accounting.pld.PLDAccountant(accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for cost in costs:
        event = accounting.GaussianDpEvent(cost.noise_multiplier)
        if cost.sample_rate < 1:
            event = accounting.PoissonSampledDpEvent(cost.sample_rate, event)
        accountant.compose(accounting.SelfComposedDpEvent(event, cost.steps))
    assert accountant.get_epsilon(delta) == pytest.approx(epsilon, rel=1e-6)
