"""Token log-probs of any provider's model: ``forward(labels=...)`` gives ``-token_logps`` [b, s] in fp32, over the real vocabulary only."""

from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor


def mask_padding(model: torch.nn.Module, vocab_size: int) -> None:
    """Replaces the loss of this instance, so that rows that pad the vocabulary never count in the softmax.

    Megatron pads the vocabulary for tensor parallelism and leaves the padding in the softmax. Instances are changed, not classes, and only
    those that compute Megatron's language model loss (the last stage's GPTModel): a model of another kind must mask by itself.

    Args:
        vocab_size: real tokens; a rank's padding is what its shard of the vocabulary holds beyond them.
    """
    if not hasattr(model, "compute_language_model_loss"):
        return

    def compute_language_model_loss(labels: Tensor, logits: Tensor) -> Tensor:
        """labels [b, s], logits [s, b, V / tp] -> -token_logps [b, s]."""
        first = parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
        logits = logits.float()
        padding = first + logits.shape[-1] - vocab_size
        if padding > 0:
            # In place, as the cross entropy below overwrites its logits anyway: a copy of them would be the largest tensor of the step.
            logits[..., max(0, logits.shape[-1] - padding) :] = torch.finfo(logits.dtype).min
        losses: Tensor = tensor_parallel.vocab_parallel_cross_entropy(logits, labels.transpose(0, 1).contiguous())
        return losses.transpose(0, 1).contiguous()

    instance: Any = model
    instance.compute_language_model_loss = compute_language_model_loss
