"""Which examples make up a batch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_spin.data.sampler import BatchSampler
from megatron_spin.errors import DataError


@given(examples=st.integers(8, 60), batch=st.integers(1, 8), seed=st.integers(0, 5))
def test_an_epoch_sees_each_example_at_most_once_and_drops_only_the_rest(examples: int, batch: int, seed: int) -> None:
    sampler = BatchSampler(examples, batch, seed)
    for epoch in range(2):
        first = epoch * sampler.steps_per_epoch
        seen = np.concatenate([sampler.batch(first + i) for i in range(sampler.steps_per_epoch)])
        assert len(set(seen.tolist())) == len(seen) == examples - sampler.dropped_per_epoch


def test_epochs_are_shuffled_differently_and_repeatably() -> None:
    sampler = BatchSampler(64, 64, 3)
    assert sampler.batch(0).tolist() != sampler.batch(1).tolist()
    assert sampler.batch(1).tolist() == BatchSampler(64, 64, 3).batch(1).tolist()
    assert sampler.batch(0).tolist() != BatchSampler(64, 64, 4).batch(0).tolist()


def test_an_epoch_is_drawn_once() -> None:
    """Its batches are parts of one permutation, the same as ever."""
    sampler = BatchSampler(64, 8, 3)
    first, second = sampler.batch(8), sampler.batch(9)
    assert first.base is second.base is not None
    order = np.random.Generator(np.random.PCG64([3, 1])).permutation(64)
    assert [*first, *second] == order[:16].tolist()


def test_too_few_examples() -> None:
    with pytest.raises(DataError, match=r"7 training examples are fewer than training\.global_batch_size=8"):
        BatchSampler(7, 8, 0)
