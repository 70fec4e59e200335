"""Which examples make up a batch, and what counts in it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_spin.data.batches import BatchSampler, Example, collate, microbatch_indices, sequence_length
from megatron_spin.errors import DataError
from megatron_spin.training.forward_step import response_logps

CPU = torch.device("cpu")
END = 2
EXAMPLES = [
    Example([5, 6, 7], ([10, 11, END], [12, END])),
    Example([8], ([13, END], [14, 15, 16, 17])),  # the generated answer was cut: no end token
]


def test_mask_is_the_response_alone_with_its_end_token_once():
    batch = collate(EXAMPLES, length=sequence_length(EXAMPLES, 8), device=CPU)
    assert batch.input_ids.shape == (4, 8)
    expected = [[10, 11, END], [13, END], [12, END], [14, 15, 16, 17]]  # real answers first, then the generated ones
    for row, answer in enumerate(expected):
        counted = batch.labels[row][batch.response_mask[row] > 0].tolist()
        assert counted == answer
    assert batch.input_ids[0, :5].tolist() == [5, 6, 7, 10, 11]


def test_opponent_scores_follow_their_sequences():
    scores = np.array([[1.0, 2.0], [3.0, 4.0]], dtype=np.float32)
    batch = collate(EXAMPLES, length=8, device=CPU, opponent_logps=scores)
    assert batch.opponent_logps.tolist() == [1.0, 3.0, 2.0, 4.0]


def test_padding_counts_neither_in_the_sum_nor_in_the_gradient():
    batch = collate(EXAMPLES, length=8, device=CPU)
    losses = torch.ones(4, 8)
    losses[batch.response_mask == 0] = float("inf")
    losses.requires_grad_()
    logps = response_logps(losses, batch.response_mask)
    logps.sum().backward()
    assert logps.tolist() == [-3.0, -2.0, -2.0, -4.0]
    assert torch.equal(losses.grad, -batch.response_mask)


@given(examples=st.integers(8, 60), batch=st.integers(1, 8), seed=st.integers(0, 5))
def test_an_epoch_sees_each_example_at_most_once_and_drops_only_the_rest(examples, batch, seed):
    sampler = BatchSampler(examples, batch, seed)
    for epoch in range(2):
        first = epoch * sampler.steps_per_epoch
        seen = np.concatenate([sampler.batch(first + i) for i in range(sampler.steps_per_epoch)])
        assert len(set(seen.tolist())) == len(seen) == examples - sampler.dropped_per_epoch


def test_epochs_are_shuffled_differently_and_repeatably():
    sampler = BatchSampler(64, 64, 3)
    assert sampler.batch(0).tolist() != sampler.batch(1).tolist()
    assert sampler.batch(1).tolist() == BatchSampler(64, 64, 3).batch(1).tolist()
    assert sampler.batch(0).tolist() != BatchSampler(64, 64, 4).batch(0).tolist()


def test_too_few_examples():
    with pytest.raises(DataError, match=r"7 training examples are fewer than training\.global_batch_size=8"):
        BatchSampler(7, 8, 0)


@given(micro=st.integers(1, 4), per_rank=st.integers(1, 4), ranks=st.integers(1, 4))
def test_data_parallel_shares_are_disjoint_and_whole(micro, per_rank, ranks):
    indices = np.arange(micro * per_rank * ranks)
    shares = [microbatch_indices(indices, micro_batch_size=micro, dp_rank=rank, dp_size=ranks) for rank in range(ranks)]
    assert all(len(share) == per_rank and all(len(part) == micro for part in share) for share in shares)
    assert np.concatenate([part for share in shares for part in share]).tolist() == indices.tolist()
