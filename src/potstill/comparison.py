"""Whether repeated runs agree with a published number, with each other, and in their order.

Values are test accuracies in percent, or anything else of that size, one of each run. What is equal
on paper may not be in floats, 64.4 - 63.9 is 0.5000000000000071; so a difference of less than 1e-9
counts as none throughout: a gap of exactly the tolerance is within it, and equal gaps have no
spread. A value that is not finite is a run that diverged: ValueError, with its name.

    >>> ours = summary([69.1, 69.3, 69.2])
    >>> in_words(ours)
    '69.20 ± 0.25 (n = 3)'
    >>> verdict(ours, published=69.5)
    'matches'
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

# scipy.stats takes a second to load: imported where it is used.

CONFIDENCE = 0.95
"""Of the intervals: the share of repeated experiments whose interval holds the true mean."""

SLACK_DIGITS = 9
SLACK = 10.0**-SLACK_DIGITS
"""What separates two values at least; decimals of two places are 1e-14 off in floats."""

Outcome = Literal["matches", "above", "below", "inconclusive", "not comparable"]


@dataclass(frozen=True)
class Summary:
    """Repeated runs of one setting; std is of the sample (n - 1), half_width of the t-interval.

    One run has neither.
    """

    mean: float
    std: float | None
    n: int
    half_width: float | None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Where the mean of all runs of this setting is expected, low and high."""
        if self.half_width is None:
            return None
        return self.mean - self.half_width, self.mean + self.half_width


@dataclass(frozen=True)
class Paired:
    """First minus second, over the seeds that both have; p is of the two-sided paired t-test.

    One shared seed has no std, half_width or p.
    """

    mean: float
    std: float | None
    n: int
    half_width: float | None
    p: float | None
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Rank:
    """Kendall's tau-b over n common names, 1 for the same order, -1 for the reverse.

    tau and p are None below two names, or where one side has a single value.
    """

    tau: float | None
    p: float | None
    n: int


def summary(values: Sequence[float], confidence: float = CONFIDENCE) -> Summary:
    """Mean, sample standard deviation and t-interval of one setting's runs.

    ValueError without values, or where one is not finite.
    """
    runs = [_finite(v, f"run {i} of {len(values)}") for i, v in enumerate(values, 1)]
    if not runs:
        raise ValueError("there is nothing to summarise: give the result of at least one run")
    mean, std = _mean_and_std(runs)
    return Summary(mean, std, len(runs), _half_width(std, len(runs), confidence))


def paired(
    first: Mapping[int, float], second: Mapping[int, float], confidence: float = CONFIDENCE
) -> Paired | None:
    """First minus second by shared seed, with a paired t-test; None where they share no seed.

    Differences that are all the same leave no doubt: p is 0 for one that is not 0, and 1 for 0.
    """
    sides = [
        {seed: _finite(v, f"seed {seed} of the {name} setting") for seed, v in side.items()}
        for name, side in (("first", first), ("second", second))
    ]
    seeds = tuple(sorted(sides[0].keys() & sides[1].keys()))
    # Rounded: 64.4 - 63.9 and 69.5 - 69.0 would have a spread of 5e-15, and a p to match.
    differences = [round(sides[0][s] - sides[1][s], SLACK_DIGITS) for s in seeds]
    if not differences:
        return None
    n = len(seeds)
    mean, std = _mean_and_std(differences)
    return Paired(mean, std, n, _half_width(std, n, confidence), _p(mean, std, n), seeds)


def verdict(
    ours: Summary, published: float, tolerance: float = 0.5, comparable: bool = True
) -> Outcome:
    """Whether our runs reproduce a published number, and on which side they are if not.

    "matches" takes three runs, a mean within the tolerance, and an interval no wider than that to
    each side. "above" and "below" take two, a mean beyond the tolerance, and an interval that lies
    on that side whole. Anything else is "inconclusive", one run always. "not comparable" is for a
    setting that is not the published one, whatever it gives.
    """
    if not comparable:
        return "not comparable"
    if _finite(tolerance, "the tolerance") < 0:
        raise ValueError(f"the tolerance is {tolerance}: give 0 or more")
    gap = _finite(ours.mean, "our mean") - _finite(published, "the published number")
    if ours.n < 2 or ours.half_width is None:
        return "inconclusive"
    most = tolerance + SLACK
    if ours.n >= 3 and abs(gap) <= most and ours.half_width <= most:
        return "matches"
    if abs(gap) > most and abs(gap) - ours.half_width > SLACK:
        return "above" if gap > 0 else "below"
    return "inconclusive"


def ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Place of each name, 1 for the highest value; equal values share the mean of their places.

    >>> ranks({"kd": 73.3, "at": 72.8, "crd": 75.5, "fitnet": 72.8})
    {'kd': 2.0, 'at': 3.5, 'crd': 1.0, 'fitnet': 3.5}
    """
    rounded = _rounded(values, "value")
    found = list(rounded.values())
    return {
        name: sum(other > value for other in found) + (found.count(value) + 1) / 2
        for name, value in rounded.items()
    }


def kendall(ours: Mapping[str, float], published: Mapping[str, float]) -> Rank:
    """Whether two tables put their common names in the same order: Kendall's tau-b.

    p is two-sided against no association: exact without ties, of the normal approximation with
    them. Few names cannot have a small one: two give 1, three 1/3, four 1/12 at the least.
    """
    one, other = _rounded(ours, "our value"), _rounded(published, "the published value")
    names = [name for name in one if name in other]
    x, y = [one[name] for name in names], [other[name] for name in names]
    if len(set(x)) < 2 or len(set(y)) < 2:
        return Rank(None, None, len(names))
    from scipy import stats

    found = stats.kendalltau(x, y)
    return Rank(float(found.statistic), float(found.pvalue), len(names))


def in_words(s: Summary, digits: int = 2) -> str:
    """Mean ± half width of the interval, as in "69.12 ± 0.31 (n = 3)"."""
    mean = f"{s.mean:z.{digits}f}"  # z: no -0.00
    if s.half_width is None:
        return f"{mean} (n = {s.n}, no interval)"
    return f"{mean} ± {s.half_width:.{digits}f} (n = {s.n})"


def _finite(value: float, name: str) -> float:
    """A plain float, of numpy's too; ValueError where it is nan or infinite."""
    if not math.isfinite(value):
        raise ValueError(
            f"{name} is {value}: a diverged run cannot be compared; repeat it, or leave it out and "
            "say so"
        )
    return float(value)


def _rounded(values: Mapping[str, float], kind: str) -> dict[str, float]:
    return {n: round(_finite(v, f'{kind} of "{n}"'), SLACK_DIGITS) for n, v in values.items()}


def _mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Of fractions, not of rounded sums: equal values have a std of exactly 0."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def _half_width(std: float | None, n: int, confidence: float) -> float | None:
    """Of the t-interval of a mean."""
    if not 0 < confidence < 1:
        raise ValueError(f"the confidence is {confidence}: give a share between 0 and 1, as 0.95")
    if std is None:
        return None
    from scipy import stats

    return float(stats.t.ppf((1 + confidence) / 2, n - 1)) * std / math.sqrt(n)


def _p(mean: float, std: float | None, n: int) -> float | None:
    """Two-sided, of a t-test of the mean against 0."""
    if std is None:
        return None
    if std == 0:
        return 0.0 if mean else 1.0
    from scipy import stats

    return float(2 * stats.t.sf(abs(mean) / (std / math.sqrt(n)), n - 1))
