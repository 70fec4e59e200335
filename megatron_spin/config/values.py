"""How a field's values are declared: per iteration, within a range, merged over defaults."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")
PerIteration: TypeAlias = T | list[T]
"""A scalar is the same value in every iteration; a list gives one value per iteration, and if it is short its last
value repeats."""


def at_iteration(value: PerIteration[T], iteration: int) -> T:
    """The value of a per-iteration setting in ``iteration``."""
    if isinstance(value, list):
        return typing.cast(T, value[min(iteration, len(value) - 1)])
    return value


def as_list(value: PerIteration[T]) -> list[T]:
    """All values of a per-iteration setting."""
    return value if isinstance(value, list) else [value]


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a field may have, for ``Annotated[float, Range(...)]``.

    For a per-iteration list every value must be in the range; null always is.
    """

    low: float = -math.inf
    high: float = math.inf
    above_low: bool = False
    """``low`` itself is outside."""
    below_high: bool = False
    """``high`` itself is outside."""
    hint: str = ""
    """Why, or what to set; ends the message."""

    def __contains__(self, value: float) -> bool:
        # Written so that NaN is outside every range.
        from_low = self.low < value if self.above_low else self.low <= value
        to_high = value < self.high if self.below_high else value <= self.high
        return from_low and to_high

    @property
    def rule(self) -> str:
        """What a value must be, as the end of a sentence."""
        if self.high == math.inf:
            if self.above_low:
                return f"must be greater than {self.low:g}"
            return "must not be negative" if self.low == 0 else f"must be at least {self.low:g}"
        ends = [(self.low, self.above_low), (self.high, self.below_high)]
        excluded = [f"{end:g}" for end, outside in ends if outside]
        rule = f"must lie between {self.low:g} and {self.high:g}"
        return f"{rule}, {' and '.join(excluded)} excluded" if excluded else rule

    @property
    def interval(self) -> str:
        """The range in a table."""
        if self.high == math.inf:
            return f"{'>' if self.above_low else '≥'} {self.low:g}"
        return f"{'(' if self.above_low else '['}{self.low:g}, {self.high:g}{')' if self.below_high else ']'}"


Positive = Range(low=0, above_low=True)
NotNegative = Range(low=0)
Share = Range(low=0, high=1)


@dataclasses.dataclass(frozen=True)
class MergedOver:
    """Marks a mapping whose given keys are merged over ``defaults``, for ``Annotated[dict[str, Any],
    MergedOver(...)]``."""

    defaults: Mapping[str, Any]
