"""Which sequences make up a batch, and how they become tensors. A batch is a pure function of the step, so there is nothing to resume."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from megatron_spin.errors import DataError

TokenIds = Sequence[int]


@dataclasses.dataclass(frozen=True)
class Example:
    """One prompt with its answers: one for SFT, real and generated for SPIN."""

    prompt_ids: TokenIds
    responses: tuple[TokenIds, ...]


@dataclasses.dataclass(frozen=True)
class Microbatch:
    """Right-padded sequences. For pairs n = 2b: the b real answers first, then the b generated ones in the same order."""

    input_ids: torch.Tensor
    """[n, s] int64"""
    labels: torch.Tensor
    """[n, s] int64: the next token at each position."""
    response_mask: torch.Tensor
    """[n, s] float32: 1 where the label is a response token, 0 for prompt and padding."""
    opponent_logps: torch.Tensor | None = None
    """[n] float32: the opponent's summed log-probs of the same sequences; None while scoring and for SFT."""

    def position_ids(self) -> torch.Tensor:
        """[n, s] int64"""
        return torch.arange(self.input_ids.shape[1], device=self.input_ids.device).expand_as(self.input_ids)


@dataclasses.dataclass(frozen=True)
class BatchSampler:
    """Global batches of example indices, reshuffled each epoch; the last, incomplete batch of an epoch is dropped.

    Raises:
        DataError: fewer examples than one global batch.
    """

    num_examples: int
    global_batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_examples < self.global_batch_size:
            raise DataError(
                f"{self.num_examples} training examples are fewer than training.global_batch_size={self.global_batch_size}: "
                "lower it or give more data"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.num_examples // self.global_batch_size

    @property
    def dropped_per_epoch(self) -> int:
        return self.num_examples % self.global_batch_size

    def batch(self, step: int) -> np.ndarray:
        """Example indices of optimizer step ``step`` (from 0), [global_batch_size]."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.num_examples)
        return order[position * self.global_batch_size : (position + 1) * self.global_batch_size]


def sequence_length(examples: Sequence[Example], multiple: int) -> int:
    """Positions that the longest example needs (its tokens less one, for the shift), rounded up to ``multiple``.

    Every microbatch is padded to it: pipeline stages exchange tensors of one shape, and scoring sees the very shapes that training does.
    """
    longest = max(len(e.prompt_ids) + max(len(r) for r in e.responses) for e in examples) - 1
    return -(-longest // multiple) * multiple


def collate(
    examples: Sequence[Example], *, length: int, device: torch.device, opponent_logps: np.ndarray | None = None
) -> Microbatch:
    """Tensors of one microbatch, the first responses of all examples, then the second ones.

    Args:
        examples: b examples with r responses each.
        length: s, from :func:`sequence_length`.
        opponent_logps: [b, r] float32, or None.
    """
    kinds = len(examples[0].responses)
    rows = [(example.prompt_ids, example.responses[kind]) for kind in range(kinds) for example in examples]
    tokens = np.zeros((len(rows), length + 1), dtype=np.int64)
    mask = np.zeros((len(rows), length), dtype=np.float32)
    for row, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        tokens[row, : len(prompt)] = prompt
        tokens[row, len(prompt) : end] = response
        mask[row, len(prompt) - 1 : end - 1] = 1.0
    batch = torch.from_numpy(tokens).to(device)
    return Microbatch(
        input_ids=batch[:, :-1].contiguous(),
        labels=batch[:, 1:].contiguous(),
        response_mask=torch.from_numpy(mask).to(device),
        opponent_logps=None
        if opponent_logps is None
        else torch.from_numpy(np.ascontiguousarray(opponent_logps.T).reshape(-1)).to(device),
    )


def microbatch_indices(indices: np.ndarray, *, micro_batch_size: int, dp_rank: int, dp_size: int) -> list[np.ndarray]:
    """This data parallel rank's contiguous share of a global batch, cut into microbatches."""
    share = np.split(indices, dp_size)[dp_rank]
    return np.split(share, len(share) // micro_batch_size)
