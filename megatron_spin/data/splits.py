"""Which rows are trained on and which are held out; every choice depends on a seed and the rows alone. No torch."""

import random
from collections.abc import Iterable, Sequence

from megatron_spin.data.rows import Row


def split(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on and held-out rows; rows with the same prompt stay together, so that no prompt is in both.

    ``fraction`` is a share of the prompts. If it is positive and there are two prompts, at least one is held out.
    """
    # Sorted, so that the choice does not depend on the order of the rows.
    prompts = sorted({tuple(row.prompt_ids) for row in rows})
    count = round(len(prompts) * fraction)
    if fraction > 0 and not count and len(prompts) > 1:
        count = 1
    # A text as seed: the split and the draws below take different random numbers from the same seed.
    chosen = set(random.Random(f"held-out {seed}").sample(prompts, count))
    train: list[Row] = []
    held_out: list[Row] = []
    for row in rows:
        side = held_out if tuple(row.prompt_ids) in chosen else train
        side.append(row)
    return train, held_out


def draw(rows: Sequence[Row], count: int | None, seed: int) -> list[Row]:
    """``count`` rows (None: all) in an order that ``seed`` decides; a smaller count gives the start of a larger one."""
    order = list(rows)
    random.Random(f"draw {seed}").shuffle(order)
    return order[:count]


def num_repeated(rows: Iterable[Row], others: Iterable[Row]) -> int:
    """How many of ``rows`` have a prompt that one of ``others`` has."""
    prompts = {tuple(row.prompt_ids) for row in others}
    return sum(tuple(row.prompt_ids) in prompts for row in rows)
