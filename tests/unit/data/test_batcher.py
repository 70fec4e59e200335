"""How a global batch is cut into microbatches, and what counts in one."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_spin.data.batcher import Batcher, Example, Microbatch

CPU = torch.device("cpu")
END = 2
EXAMPLES = [
    Example([5, 6, 7], ([10, 11, END], [12, END])),
    Example([8], ([13, END], [14, 15, 16, 17])),  # the generated answer was cut: no end token
]


def batcher(examples: list[Example], *, micro: int = 2, dp_rank: int = 0, dp_size: int = 1) -> Batcher:
    return Batcher(examples, micro_batch_size=micro, alignment=8, dp_rank=dp_rank, dp_size=dp_size, device=CPU)


def one_batch(reference: np.ndarray | None = None) -> Microbatch:
    [batch] = batcher(EXAMPLES).microbatches(np.arange(2), reference)
    return batch


def test_mask_is_the_response_alone_with_its_end_token_once() -> None:
    batch = one_batch()
    assert batch.input_ids.shape == (4, 8)
    for row, index in enumerate(batch.rows.tolist() * 2):
        answer = EXAMPLES[index].answers[row // 2]  # real answers first, then the generated ones
        counted = batch.labels[row][batch.response_mask[row] > 0].tolist()
        assert counted == answer
    row = batch.rows.tolist().index(0)
    assert batch.input_ids[row, :5].tolist() == [5, 6, 7, 10, 11]


def test_reference_follows_its_answers() -> None:
    scores = np.array([[1.0, 2.0], [3.0, 4.0]], dtype=np.float32)
    batch = one_batch(scores)
    assert batch.reference is not None
    assert batch.reference.tolist() == scores[batch.rows].tolist()


def test_padding_counts_neither_in_the_sum_nor_in_the_gradient() -> None:
    batch = one_batch()
    losses = torch.ones(4, 8)
    losses[batch.response_mask == 0] = float("inf")
    losses.requires_grad_()
    logps = -batch.sum_by_answer(losses)
    logps.sum().backward()
    expected = [[-3.0, -2.0], [-2.0, -4.0]]
    assert logps.tolist() == [expected[row] for row in batch.rows]
    assert losses.grad is not None
    assert torch.equal(losses.grad, -batch.response_mask)
    assert batch.lengths.tolist() == (-logps).tolist()


def test_identical_answers_are_marked() -> None:
    examples = [Example([1], ([5, END], [5, END], [5])), Example([1], ([5, 0], [5], [6, END]))]
    [batch] = batcher(examples).microbatches(np.arange(2))
    expected = [[True, True, False], [True, False, False]]
    assert batch.identical.tolist() == [expected[row] for row in batch.rows]


@given(micro=st.integers(1, 4), per_rank=st.integers(1, 4), ranks=st.integers(1, 4), seed=st.integers(0, 3))
def test_data_parallel_shares_are_disjoint_and_whole(micro: int, per_rank: int, ranks: int, seed: int) -> None:
    """Every rank has as many microbatches, each as large; together they are the global batch."""
    generator = np.random.default_rng(seed)
    count = micro * per_rank * ranks
    examples = [Example([1] * int(generator.integers(1, 30)), ([3],)) for _ in range(count)]
    indices = generator.permutation(count)
    seen = []
    for rank in range(ranks):
        batches = batcher(examples, micro=micro, dp_rank=rank, dp_size=ranks).microbatches(indices)
        assert len(batches) == per_rank
        for batch in batches:
            assert len(batch.rows) == micro
            for row, place in enumerate(batch.rows):
                assert batch.response_mask[row].argmax() == len(examples[indices[place]].prompt_ids) - 1
            seen += batch.rows.tolist()
    assert sorted(seen) == list(range(count))


def test_tokens_of_an_example_count_the_prompt_once_per_answer() -> None:
    assert EXAMPLES[0].num_tokens == 2 * 3 + 3 + 2
    with pytest.raises(ValueError, match="max"):
        _ = Example([1], ()).longest


def test_a_microbatch_is_as_long_as_its_own_longest_sequence() -> None:
    """Two long prompts do not pad two short ones, and every length is a multiple of the alignment."""
    examples = [Example([1] * size, ([3, 4], [3])) for size in (30, 2, 3, 28)]
    batches = batcher(examples).microbatches(np.arange(4))
    assert [batch.input_ids.shape for batch in batches] == [(4, 32), (4, 8)]
    assert [sorted(batch.rows.tolist()) for batch in batches] == [[0, 3], [1, 2]]


def test_ranks_share_long_prompts() -> None:
    """The n-th microbatches of two ranks are about equally long."""
    examples = [Example([1] * size, ([3],)) for size in range(8, 72, 8)]
    lengths = []
    for rank in range(2):
        batches = batcher(examples, dp_rank=rank, dp_size=2).microbatches(np.arange(8))
        lengths.append([batch.input_ids.shape[1] for batch in batches])
    assert lengths == [[64, 32], [48, 16]]
