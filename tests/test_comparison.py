"""Repeated runs against published numbers: by hand, against statsmodels and scipy, degenerate."""

from __future__ import annotations

import doctest
import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from potstill import comparison
from potstill.comparison import (
    Paired,
    Rank,
    Summary,
    in_words,
    kendall,
    paired,
    ranks,
    summary,
    verdict,
)

ONE, OTHER = [69.06, 68.74, 69.31, 68.92, 69.55], [68.66, 68.81, 68.90, 68.40, 69.02]
"""Two settings of five seeds, of the references."""

T1, T2 = 12.706204736174694, 4.302652729749462
"""The 0.975 quantile of t with 1 degree of freedom, tan(0.475 pi), and with 2."""


def near(value: Any, digits: float = 1e-12) -> Any:
    return pytest.approx(value, rel=digits, abs=digits)


def seeded(values: Sequence[float]) -> dict[int, float]:
    return dict(enumerate(values))


def three(mean: float, step: float) -> Summary:
    """Runs at mean - step, mean, mean + step: std is step, half width 2.484138 step."""
    return summary([mean - step, mean, mean + step])


# Percentages of two decimals, as they are published.
percent = st.integers(0, 10000).map(lambda n: n / 100)
table = st.dictionaries(st.sampled_from("abcdefgh"), percent)
few = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 3).map(float))
by_seed = st.dictionaries(st.integers(0, 5), percent)


# Summaries


def test_a_summary_by_hand():
    """69, 70, 71: squares 1 + 0 + 1 over n - 1 = 2, std 1; 4.302653 / sqrt 3 = 2.484138."""
    s = summary([69, 70, 71])
    assert (s.mean, s.std, s.n) == (70.0, 1.0, 3)
    assert s.half_width == near(2.484138, 1e-6)
    assert s.interval == near((67.515862, 72.484138), 1e-6)
    assert isinstance(s.mean, float)


def test_two_runs_have_a_wide_interval():
    """69 and 71: std sqrt 2, of the mean 1, t with one degree of freedom is a Cauchy variable:
    tan(0.475 pi) = 12.706205.
    """
    s = summary([69.0, 71.0])
    assert s.std == near(math.sqrt(2))
    assert s.half_width == near(math.tan(0.475 * math.pi))


def test_an_interval_of_half_the_confidence_is_narrower():
    """With 2 degrees of freedom P(|t| < t0) = t0 / sqrt(2 + t0^2): t0 = sqrt(2/3) of one half."""
    assert summary([69.0, 70.0, 71.0], confidence=0.5).half_width == near(math.sqrt(2) / 3)


def test_a_summary_is_that_of_statsmodels():
    """statsmodels 0.15.0, ONE: DescrStatsW(ONE).mean and .std_mean * sqrt 5 for the std,
    .tconfint_mean(0.05) and .tconfint_mean(0.01).
    """
    s = summary(ONE)
    assert s.mean == near(69.11600000000001)
    assert s.std == near(0.31973426466364274)
    assert s.interval == near((68.71899747457502, 69.51300252542501))
    assert summary(ONE, 0.99).interval == near((68.45766272986982, 69.7743372701302))


def test_one_run_has_no_spread():
    assert summary([69.12]) == Summary(69.12, None, 1, None)
    assert summary([69.12]).interval is None


@given(percent, st.integers(2, 9))
@settings(deadline=None)  # the machine may be busy
def test_equal_runs_have_no_width(value: float, n: int):
    """Whatever rounding n times the value brings: the mean of three 0.1 is not 0.1 in floats."""
    assert summary([value] * n) == Summary(value, 0.0, n, 0.0)
    assert summary([value] * n).interval == (value, value)


def test_no_runs_are_refused():
    with pytest.raises(ValueError, match=r"^there is nothing to summarise: give the result of at"):
        summary([])


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95, -0.1, math.nan])
@pytest.mark.parametrize("runs", [[69.0], [69.0, 70.0]], ids=len)
def test_a_confidence_is_a_share(confidence: float, runs: list[float]):
    for call in (lambda: summary(runs, confidence), lambda: _paired(runs, confidence)):
        with pytest.raises(ValueError, match=r"^the confidence is .*: give a share between 0 and"):
            call()


def _paired(runs: Sequence[float], confidence: float) -> Paired | None:
    return paired(seeded(runs), seeded([0.0] * len(runs)), confidence)


@given(st.lists(percent, min_size=2, max_size=6), st.randoms(), st.integers(-50, 50))
@settings(deadline=None)
def test_the_order_of_runs_and_a_shift_do_not_change_their_spread(
    runs: list[float], random: Any, by: int
):
    s, moved = summary(runs), [run + by for run in runs]
    random.shuffle(moved)
    t = summary(moved)
    assert (t.mean, t.std, t.half_width) == (
        near(s.mean + by, 1e-9),
        near(s.std, 1e-9),
        near(s.half_width, 1e-9),
    )
    shuffled = list(runs)
    random.shuffle(shuffled)
    assert summary(shuffled) == s


def test_numbers_of_numpy_become_floats():
    s = summary(np.array([1.0, 2.0], dtype=np.float32))
    assert s == summary([1.0, 2.0])
    assert all(type(v) is float for v in (s.mean, s.std, s.half_width))
    p = paired({0: np.float64(3), 1: np.float64(5)}, {0: np.float64(1), 1: np.float64(4)})
    assert p is not None
    assert all(type(v) is float for v in (p.mean, p.std, p.half_width, p.p))
    k = kendall({"a": np.float64(1), "b": np.float64(2)}, {"a": 1, "b": 2})
    assert (type(k.tau), type(k.p)) == (float, float)


# Paired differences


def test_a_paired_difference_by_hand():
    """Differences 1, 2, 3: mean 2, std 1, t = 2 sqrt 3. With 2 degrees of freedom
    p = 1 - t / sqrt(2 + t^2) = 1 - sqrt(12/14) = 0.074180. Seed 9 is of one side only.
    """
    found = paired({2: 71.0, 0: 70.0, 5: 72.0, 9: 1.0}, {5: 69.0, 0: 69.0, 2: 69.0})
    assert found is not None
    assert (found.mean, found.std, found.n, found.seeds) == (2.0, 1.0, 3, (0, 2, 5))
    assert found.half_width == near(2.484138, 1e-6)
    assert found.p == near(0.074180, 1e-6)


def test_two_shared_seeds_by_hand():
    """Differences 0 and 2: t = 1 with one degree of freedom, p = 1 - 2 atan(1) / pi = 1/2."""
    found = paired({1: 70.0, 2: 72.0}, {1: 70.0, 2: 70.0})
    assert found == Paired(1.0, near(math.sqrt(2)), 2, near(T1), near(0.5), (1, 2))


def test_a_paired_difference_is_that_of_statsmodels_and_scipy():
    """statsmodels 0.15.0, d = np.subtract(ONE, OTHER): DescrStatsW(d).mean, np.std(d, ddof=1),
    DescrStatsW(d).tconfint_mean(0.05), and .ttest_mean(0)[1], which is also that of scipy 1.17.1,
    stats.ttest_rel(ONE, OTHER).pvalue.
    """
    found = paired(seeded(ONE), seeded(OTHER))
    assert found is not None
    assert found.mean == near(0.35799999999999843)
    assert found.std == near(0.2467184630302349)
    low, high = found.mean - found.half_width, found.mean + found.half_width
    assert (low, high) == near((0.05165856676318936, 0.6643414332368075))
    assert found.p == near(0.031535201245886324)


@given(st.lists(st.tuples(percent, percent), min_size=2, max_size=6))
@settings(deadline=None)
def test_p_is_that_of_scipy_wherever_there_is_a_spread(pairs: list[tuple[float, float]]):
    one, other = zip(*pairs, strict=True)
    found = paired(seeded(one), seeded(other))
    assert found is not None
    if found.std:
        assert found.p == near(stats.ttest_rel(one, other).pvalue, 1e-6)


def test_settings_without_a_shared_seed_have_no_difference():
    assert paired({1: 70.0}, {2: 70.0}) is None
    assert paired({}, {}) is None
    assert paired({1: 70.0}, {}) is None


def test_one_shared_seed_has_a_difference_alone():
    assert paired({1: 70.0, 2: 71.0}, {2: 69.0, 3: 0.0}) == Paired(2.0, None, 1, None, None, (2,))


def test_differences_of_the_same_decimals_have_no_spread():
    """69.2 - 68.7 is 0.5 in floats, 64.4 - 63.9 is not: 5e-15 would be their std."""
    assert 69.2 - 68.7 != 64.4 - 63.9
    found = paired({0: 69.2, 1: 64.4}, {0: 68.7, 1: 63.9})
    assert found == Paired(0.5, 0.0, 2, 0.0, 0.0, (0, 1))
    assert paired({0: 68.7, 1: 63.9}, {0: 69.2, 1: 64.4}) == Paired(-0.5, 0.0, 2, 0.0, 0.0, (0, 1))


def test_a_setting_does_not_differ_from_itself():
    """0.1 + 0.2 is 0.3 too."""
    assert paired(seeded(ONE), seeded(ONE)) == Paired(0.0, 0.0, 5, 0.0, 1.0, (0, 1, 2, 3, 4))
    found = paired({0: 0.1 + 0.2, 1: 0.3}, {0: 0.3, 1: 0.3})
    assert found == Paired(0.0, 0.0, 2, 0.0, 1.0, (0, 1))


def test_differences_that_cancel_leave_no_doubt_that_none_is_seen():
    """1 and -1: mean 0, t = 0, p = 1."""
    found = paired({0: 70.0, 1: 69.0}, {0: 69.0, 1: 70.0})
    assert found == Paired(0.0, near(math.sqrt(2)), 2, near(T1), 1.0, (0, 1))


def test_a_wider_confidence_is_a_wider_interval_and_the_same_p():
    """statsmodels 0.15.0, d as above: DescrStatsW(d).tconfint_mean(0.5), half of high - low is
    0.740697 std / sqrt 5.
    """
    wide, narrow = paired(seeded(ONE), seeded(OTHER)), paired(seeded(ONE), seeded(OTHER), 0.5)
    assert wide is not None and narrow is not None
    assert narrow.half_width == near(0.740697 * narrow.std / math.sqrt(5), 1e-6)
    assert narrow.half_width < wide.half_width
    assert narrow.p == wide.p


@given(by_seed, by_seed)
@settings(deadline=None)
def test_swapping_the_settings_flips_the_sign(first: dict[int, float], second: dict[int, float]):
    one, other = paired(first, second), paired(second, first)
    if one is None or other is None:
        assert one is other and not first.keys() & second.keys()
    else:
        assert other == Paired(-one.mean, one.std, one.n, one.half_width, one.p, one.seeds)


@given(by_seed, by_seed, st.integers(-50, 50), st.randoms())
@settings(deadline=None)
def test_the_order_of_seeds_and_a_shift_of_both_settings_change_nothing(
    first: dict[int, float], second: dict[int, float], by: int, random: Any
):
    """In hundredths, exactly so: what the shift adds in rounding is below 1e-9."""

    def moved(side: dict[int, float]) -> dict[int, float]:
        seeds = list(side)
        random.shuffle(seeds)
        return {seed: side[seed] + by for seed in seeds}

    assert paired(moved(first), moved(second)) == paired(first, second)


@given(by_seed, by_seed)
@settings(deadline=None)
def test_nothing_is_ever_nan(first: dict[int, float], second: dict[int, float]):
    """Nor does scipy warn: warnings are errors here."""
    found = paired(first, second)
    if found is not None:
        numbers = (found.mean, found.std, found.half_width, found.p)
        assert all(math.isfinite(v) for v in numbers if v is not None)
        assert all((v is None) == (found.n == 1) for v in numbers[1:])
        assert found.p is None or 0 <= found.p <= 1


# Verdicts


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        (three(69.2, 0.1), "matches"),
        (three(68.8, 0.1), "matches"),
        (three(69.2, 0.2), "matches"),
        (three(69.2, 0.21), "inconclusive"),
        (three(70.0, 0.1), "above"),
        (three(68.0, 0.1), "below"),
        (three(70.0, 0.4), "above"),
        (three(68.0, 0.4), "below"),
        (three(70.0, 0.41), "inconclusive"),
        (three(68.0, 0.41), "inconclusive"),
        (three(69.55, 0.1), "above"),
        (three(69.45, 0.1), "matches"),
        (three(69.45, 0.21), "inconclusive"),
    ],
    ids=str,
)
def test_three_runs_against_a_published_69(ours: Summary, expected: str):
    """Half widths are 2.484138 steps: 0.496828 of 0.2 and 0.521669 of 0.21, around the tolerance
    of 0.5; 0.993655 of 0.4 and 1.018497 of 0.41, around a difference of 1.
    """
    assert verdict(ours, 69.0) == expected


@pytest.mark.parametrize("value", [60.0, 69.0, 69.5, 80.0])
def test_one_run_decides_nothing(value: float):
    assert verdict(summary([value]), 69.0) == "inconclusive"


def test_two_runs_can_differ_but_not_match():
    """70 -+ 0.05: half width 12.706205 * 0.05 = 0.635310; of -+ 0.08 it is 1.016496, above 1."""
    assert verdict(summary([69.95, 70.05]), 69.0) == "above"
    assert verdict(summary([67.95, 68.05]), 69.0) == "below"
    assert verdict(summary([69.92, 70.08]), 69.0) == "inconclusive"
    assert verdict(summary([69.0, 69.0]), 69.0) == "inconclusive"
    assert verdict(summary([70.0, 70.0]), 69.0) == "above"


def test_equal_runs_are_as_sure_as_can_be():
    assert verdict(summary([69.0] * 3), 69.0, tolerance=0) == "matches"
    assert verdict(summary([69.1] * 3), 69.0, tolerance=0) == "above"
    assert verdict(summary([69.1] * 3), 69.0, tolerance=0.1) == "matches"
    assert verdict(summary([68.0] * 3), 69.0) == "below"


@pytest.mark.parametrize(("ours", "published"), [(69.5, 69.0), (64.4, 63.9), (63.9, 64.4)])
def test_exactly_the_tolerance_is_within_it(ours: float, published: float):
    """64.4 - 63.9 is 0.5 and 7e-15 in floats. A millionth more is beyond."""
    assert 64.4 - 63.9 > 0.5
    assert verdict(summary([ours] * 3), published) == "matches"
    assert verdict(summary([ours] * 2), published) == "inconclusive"
    more = ours + math.copysign(1e-6, ours - published)
    assert verdict(summary([more] * 3), published) == ("above" if more > published else "below")


def test_an_interval_exactly_as_wide_as_the_tolerance_is_narrow_enough():
    for width in (0.5, 64.4 - 63.9):
        assert verdict(Summary(69.0, 0.2, 3, width), 69.0) == "matches"
    assert verdict(Summary(69.0, 0.2, 3, 0.500001), 69.0) == "inconclusive"


def test_an_interval_that_ends_at_the_published_number_holds_it():
    """64.2 - 63.4 is 0.8 and 4e-15 in floats."""
    assert abs(64.2 - 63.4) > 0.8
    for ours, published in ((64.2, 63.4), (63.4, 64.2)):
        side = "above" if ours > published else "below"
        assert verdict(Summary(ours, 0.3, 3, 0.8), published) == "inconclusive"
        assert verdict(Summary(ours, 0.3, 3, 0.799999), published) == side


def test_a_tolerance_can_be_given():
    ours = three(70.0, 0.1)
    assert verdict(ours, 69.0, tolerance=1.0) == "matches"
    assert verdict(ours, 69.9, tolerance=0.2) == "inconclusive"
    assert verdict(ours, 69.7, tolerance=0.2) == "above"


def test_what_is_not_comparable_is_said_to_be_so():
    """Whatever it gives, a match or nothing that could be one."""
    for ours in (three(69.0, 0.1), three(60.0, 0.1), summary([69.0])):
        assert verdict(ours, 69.0, comparable=False) == "not comparable"


def test_a_tolerance_below_zero_is_refused():
    with pytest.raises(ValueError, match=r"^the tolerance is -0\.1: give 0 or more$"):
        verdict(three(69.0, 0.1), 69.0, tolerance=-0.1)


@given(st.lists(percent, min_size=1, max_size=5), percent, st.integers(-50, 50))
@settings(deadline=None)
def test_a_shift_of_both_changes_no_verdict_and_a_mirror_turns_it(
    runs: list[float], published: float, by: int
):
    found = verdict(summary(runs), published)
    assert verdict(summary([run + by for run in runs]), published + by) == found
    mirrored = {"above": "below", "below": "above"}.get(found, found)
    assert verdict(summary([-run for run in runs]), -published) == mirrored


# Ranks


def test_ranks_by_hand():
    """The names stay in their order; places 3 and 4 are shared, so are 2, 3 and 4."""
    assert list(ranks({"kd": 73.3, "at": 72.8, "crd": 75.5, "fitnet": 72.8}).items()) == [
        ("kd", 2.0),
        ("at", 3.5),
        ("crd", 1.0),
        ("fitnet", 3.5),
    ]
    assert ranks({"a": 1, "b": 2, "c": 1, "d": 1, "e": 0}) == {
        "a": 3,
        "b": 1,
        "c": 3,
        "d": 3,
        "e": 5,
    }


def test_ranks_of_one_name_and_of_none():
    assert ranks({"kd": 73.3}) == {"kd": 1.0}
    assert ranks({}) == {}


def test_equal_decimals_share_a_rank():
    assert ranks({"a": 0.1 + 0.2, "b": 0.3}) == {"a": 1.5, "b": 1.5}


@given(table)
@settings(deadline=None)
def test_ranks_are_those_of_scipy(values: dict[str, float]):
    expected = stats.rankdata([-v for v in values.values()])
    assert list(ranks(values).values()) == list(expected)


# Kendall's tau


def test_one_swap_of_four_by_hand():
    """5 of 6 pairs agree, 1 does not: tau 4/6. Of 24 orders 1 + 3 have at most one swap, and as
    many at the other end: p = 8/24.
    """
    ours = {"kd": 4.0, "at": 3.0, "crd": 1.0, "rkd": 2.0}
    published = {"kd": 40.0, "at": 30.0, "crd": 20.0, "rkd": 10.0}
    assert kendall(ours, published) == Rank(near(2 / 3), near(1 / 3), 4)


def test_ties_by_hand():
    """Six names, 15 pairs, each side with one tie: c and d here, e and f there. Of the 13 others
    b-c and b-d disagree, 11 agree: tau-b = 9 / sqrt(14 * 14).

    p of scipy 1.17.1: stats.kendalltau([76.1, 74.2, 75.0, 75.0, 73.3, 72.8],
    [75.9, 75.1, 74.6, 74.9, 73.1, 73.1]).pvalue.
    """
    names = "abcdef"
    ours = dict(zip(names, [76.1, 74.2, 75.0, 75.0, 73.3, 72.8], strict=True))
    published = dict(zip(names, [75.9, 75.1, 74.6, 74.9, 73.1, 73.1], strict=True))
    assert kendall(ours, published) == Rank(near(9 / 14), near(0.07983871964585261), 6)


def test_an_order_without_ties_is_that_of_scipy():
    """scipy 1.17.1: stats.kendalltau(range(6), [0, 2, 1, 3, 5, 4]), exact: 0, 1 and 2 swaps are
    1 + 5 + 14 of 720 orders, with those of the other end 40. tau is (13 - 2) / 15.
    """
    ours = dict(zip("abcdef", range(6), strict=True))
    published = dict(zip("abcdef", [0, 2, 1, 3, 5, 4], strict=True))
    assert kendall(ours, published) == Rank(near(0.7333333333333333), near(0.05555555555555555), 6)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_same_order_and_its_reverse(n: int):
    """The ends of n! orders: p = 2 / n!."""
    one = dict(zip("abcd"[:n], range(n), strict=True))
    for sign in (1, -1):
        other = {name: 10.0 * sign * value for name, value in one.items()}
        assert kendall(one, other) == Rank(near(sign), near(2 / math.factorial(n)), n)


def test_names_of_one_side_do_not_count():
    """In the order of neither: by name, not by place."""
    ours = {"a": 1.0, "b": 2.0, "x": 0.0}
    assert kendall(ours, {"y": 9.0, "b": 4.0, "a": 3.0}) == Rank(1.0, 1.0, 2)


@pytest.mark.parametrize(
    ("ours", "published", "n"),
    [
        ({}, {}, 0),
        ({"a": 1.0}, {"b": 1.0}, 0),
        ({"a": 1.0, "b": 2.0}, {"a": 1.0, "c": 2.0}, 1),
        ({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 2.0}, 2),
        ({"a": 1.0, "b": 2.0, "c": 3.0}, {"a": 5.0, "b": 5.0, "c": 5.0}, 3),
        ({"a": 0.1 + 0.2, "b": 0.3}, {"a": 1.0, "b": 2.0}, 2),
    ],
    ids=["nothing", "no name", "one name", "ours constant", "published constant", "0.3 twice"],
)
def test_without_two_different_values_on_each_side_there_is_no_order(
    ours: dict[str, float], published: dict[str, float], n: int
):
    assert kendall(ours, published) == Rank(None, None, n)


@given(few, few)
@settings(deadline=None, max_examples=300)
def test_tau_b_is_its_definition(ours: dict[str, float], published: dict[str, float]):
    """Pairs that agree minus those that do not, over the root of those that are not tied here times
    those that are not tied there. Never nan, never a warning.
    """
    found = kendall(ours, published)
    names = sorted(ours.keys() & published.keys())
    signs = [
        (np.sign(ours[a] - ours[b]), np.sign(published[a] - published[b]))
        for a, b in itertools.combinations(names, 2)
    ]
    here, there = (sum(abs(pair[side]) for pair in signs) for side in (0, 1))
    assert found.n == len(names)
    if here and there:
        assert found.tau == near(sum(x * y for x, y in signs) / math.sqrt(here * there))
        assert found.p is not None and 0 <= found.p <= 1
    else:
        assert (found.tau, found.p) == (None, None)


@given(few, few, st.integers(-50, 50))
@settings(deadline=None)
def test_tau_does_not_know_the_sides_and_turns_with_one(
    ours: dict[str, float], published: dict[str, float], by: int
):
    found = kendall(ours, published)
    swapped = kendall(published, ours)
    moved = kendall({k: v + by for k, v in ours.items()}, {k: 3 * v for k, v in published.items()})
    turned = kendall(ours, {name: -value for name, value in published.items()})
    for other, sign in ((swapped, 1), (moved, 1), (turned, -1)):
        assert other.n == found.n
        assert other.p == (found.p if found.p is None else near(found.p))
        assert other.tau == (found.tau if found.tau is None else near(sign * found.tau))


# Runs that diverged, words, and the module itself


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x: summary([69.0, x, 70.0]), "run 2 of 3"),
        (lambda x: paired({0: 1.0, 7: x}, {7: 1.0}), "seed 7 of the first setting"),
        (lambda x: paired({7: 1.0}, {3: x, 7: 1.0}), "seed 3 of the second setting"),
        (lambda x: ranks({"kd": 1.0, "at": x}), 'value of "at"'),
        (lambda x: kendall({"kd": x}, {}), 'our value of "kd"'),
        (lambda x: kendall({}, {"kd": x}), 'the published value of "kd"'),
        (lambda x: verdict(three(69.0, 0.1), x), "the published number"),
        (lambda x: verdict(three(69.0, 0.1), 69.0, x), "the tolerance"),
        (lambda x: verdict(Summary(x, None, 1, None), 69.0), "our mean"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_run_that_diverged_is_named(bad: float, call: Callable[[float], object], name: str):
    with pytest.raises(ValueError) as error:
        call(bad)
    assert str(error.value).startswith(f"{name} is {bad}: a diverged run cannot be compared; ")


def test_a_summary_in_words():
    """The half width, not the std: T2 * 0.125 / sqrt 3 = 0.310517."""
    assert in_words(Summary(69.123, 0.125, 3, T2 * 0.125 / math.sqrt(3))) == "69.12 ± 0.31 (n = 3)"
    assert in_words(three(69.123, 0.125), digits=1) == "69.1 ± 0.3 (n = 3)"
    assert in_words(summary([69.0] * 4)) == "69.00 ± 0.00 (n = 4)"


def test_one_run_in_words():
    assert in_words(summary([69.123])) == "69.12 (n = 1, no interval)"
    assert in_words(summary([69.123]), digits=0) == "69 (n = 1, no interval)"


def test_nothing_is_minus_zero_in_words():
    assert in_words(summary([-0.001])) == "0.00 (n = 1, no interval)"


def test_results_cannot_be_changed():
    for thing in (three(69.0, 0.1), Rank(1.0, 1.0, 2), paired({1: 1.0}, {1: 1.0})):
        with pytest.raises(FrozenInstanceError):
            thing.n = 7


def test_the_examples_run():
    failed, attempted = doctest.testmod(comparison)
    assert attempted == 4 and not failed


def test_importing_it_loads_neither_torch_nor_scipy():
    code = "import sys, potstill.comparison; print({'torch', 'scipy', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
