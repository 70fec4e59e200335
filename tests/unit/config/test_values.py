"""Per-iteration values and ranges."""

import math

import pytest

from megatron_spin.config import PerIteration, at_iteration
from megatron_spin.config.values import NotNegative, Positive, Range, Share


def test_values_by_iteration() -> None:
    settings: list[PerIteration[int]] = [[1, 2], 3]
    assert [at_iteration(settings[0], t) for t in range(4)] == [1, 2, 2, 2]
    assert at_iteration(settings[1], 5) == 3


@pytest.mark.parametrize(
    ("allowed", "inside", "outside", "interval", "rule"),
    [
        (Positive, [1e-9, 5, math.inf], [0, -1, math.nan], "> 0", "must be greater than 0"),
        (NotNegative, [0, math.inf], [-1e-9, math.nan], "≥ 0", "must not be negative"),
        (Range(low=1), [1, 2], [0.5], "≥ 1", "must be at least 1"),
        (Share, [0, 0.5, 1], [-0.1, 1.1, math.nan], "[0, 1]", "must lie between 0 and 1"),
        (Range(0, 1, above_low=True), [0.5, 1], [0], "(0, 1]", "must lie between 0 and 1, 0 excluded"),
        (Range(0, 1, below_high=True), [0, 0.5], [1], "[0, 1)", "must lie between 0 and 1, 1 excluded"),
    ],
)
def test_ranges(allowed: Range, inside: list[float], outside: list[float], interval: str, rule: str) -> None:
    assert all(value in allowed for value in inside)
    assert not any(value in allowed for value in outside)
    assert allowed.interval == interval
    assert allowed.rule == rule
