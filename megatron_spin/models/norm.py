"""RMSNorm for the local layer spec, which Megatron's own local norm refuses under sequence parallelism."""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm whose weight is marked, so that its gradient is summed over the sequence's shards.

    Input and output: [s, b, h] (or [s / tp, b, h] under sequence parallelism).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        weight: Any = self.weight
        weight.sequence_parallel = config.sequence_parallel
