"""A sequence whose items are made when they are asked for, so that a million of them take no memory. No torch."""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar, overload

import numpy as np

T = TypeVar("T")


class LazySequence(Sequence[T], Generic[T]):
    """The items ``make(n)`` for each n of ``numbers``, made anew at each access; its slices are lazy, too."""

    def __init__(self, make: Callable[[int], T], numbers: range | np.ndarray) -> None:
        self._make = make
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> "LazySequence[T]": ...
    def __getitem__(self, index: int | slice) -> "T | LazySequence[T]":
        if isinstance(index, slice):
            return LazySequence(self._make, self._numbers[index])
        return self._make(int(self._numbers[index]))
