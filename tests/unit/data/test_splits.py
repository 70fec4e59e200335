"""Splits and draws: every prompt on one side, and the same choice for the same seed."""

import pytest

from megatron_spin.data.rows import Row
from megatron_spin.data.splits import draw, num_repeated, split

ROWS = [Row(i, [1, i // 2], [5, 2], False) for i in range(40)]
"""20 prompts, each in two rows."""


def test_no_prompt_is_on_both_sides() -> None:
    train, held_out = split(ROWS, 0.25, seed=3)
    assert len(held_out) == 10
    assert sorted(row.index for row in train + held_out) == list(range(40))
    assert num_repeated(held_out, train) == 0
    assert split(ROWS, 0.25, seed=3) == (train, held_out)
    assert split(ROWS, 0.25, seed=4)[1] != held_out


@pytest.mark.parametrize(("fraction", "held_out"), [(0.0, 0), (0.001, 2), (1.0, 40)])
def test_at_least_one_prompt_is_held_out_for_a_positive_fraction(fraction: float, held_out: int) -> None:
    assert len(split(ROWS, fraction, seed=0)[1]) == held_out


def test_a_single_prompt_is_trained_on() -> None:
    assert split(ROWS[:2], 0.1, seed=0) == (ROWS[:2], [])


def test_a_smaller_draw_is_the_start_of_a_larger_one() -> None:
    assert draw(ROWS, 5, seed=1) == draw(ROWS, 10, seed=1)[:5] == draw(ROWS, None, seed=1)[:5]
    assert draw(ROWS, None, seed=2) != draw(ROWS, None, seed=1)


def test_repeated_prompts_are_counted_per_row() -> None:
    assert num_repeated(ROWS, ROWS[::2]) == 40
    assert num_repeated(ROWS[:3], ROWS[2:]) == 1
