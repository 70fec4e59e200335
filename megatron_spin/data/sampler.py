"""Which examples make up a global batch. A batch is a pure function of the step, so there is no sampler state to
save.
"""

import dataclasses
import functools

import numpy as np

from megatron_spin.errors import DataError


@dataclasses.dataclass(frozen=True)
class BatchSampler:
    """Global batches of example indices, reshuffled each epoch; the last, incomplete batch of an epoch is dropped.

    Raises:
        DataError: there are fewer examples than one global batch needs.
    """

    num_examples: int
    global_batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_examples < self.global_batch_size:
            raise DataError(
                f"{self.num_examples} training examples are fewer than training.global_batch_size="
                f"{self.global_batch_size}: lower it or give more data"
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
        order = _order(self.num_examples, self.seed, epoch)
        return order[position * self.global_batch_size : (position + 1) * self.global_batch_size]


@functools.lru_cache(maxsize=1)
def _order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch; kept, since drawing that of a million examples takes 25 ms, and each step needs it."""
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_examples)
    order.flags.writeable = False  # all batches of the epoch are views of it
    return order
