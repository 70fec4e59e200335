"""Section ``parallel``."""

import dataclasses
from typing import Annotated, Any

from megatron_spin.config.values import Positive


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How training is spread over processes."""

    tensor_model_parallel_size: Annotated[int, Positive] = 1
    """Ranks that share each layer's matrices."""
    pipeline_model_parallel_size: Annotated[int, Positive] = 1
    """Ranks that hold consecutive layers."""
    context_parallel_size: Annotated[int, Positive] = 1
    """Ranks that share each sequence; more than 1 needs packed sequences, which do not exist yet."""
    sequence_parallel: bool = False
    """Shard the activations of the norms over the tensor parallel ranks."""
    use_distributed_optimizer: bool = True
    """Shard the optimizer state over the data parallel ranks."""
    ddp: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Any field of ``DistributedDataParallelConfig``."""
    timeout: Annotated[int, Positive] = 30
    """Minutes that a rank waits for the others before it gives up: long enough for rank 0 to write an export while
    the others wait."""
    nproc_per_node: Annotated[int | None, Positive] = None
    """Processes that the driver starts on each node; null: one per GPU, or on a CPU as many as one model replica
    needs."""

    @property
    def replica_size(self) -> int:
        """Processes that one copy of the model is spread over."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def weights_size(self) -> int:
        """Processes that hold all weights once, which is what a conversion needs."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size
