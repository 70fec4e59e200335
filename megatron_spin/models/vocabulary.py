"""The vocabulary's padding: rows that exist only so that tensor parallel ranks hold equal shares."""

from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor


def mask_padding(model: torch.nn.Module, vocab_size: int) -> None:
    """Makes ``model.forward(labels=...)`` give ``-token_logps`` [b, s] in fp32, over the real vocabulary only.

    Megatron pads the vocabulary and leaves the padding in the softmax, where it would take probability from real
    tokens.

    This patches the instance: its method ``compute_language_model_loss`` is replaced, the class stays as it is, so a
    user's own subclass of GPTModel gets the same loss. Models without that method, which are not Megatron's
    LanguageModule, are left alone and must mask by themselves.

    Args:
        vocab_size: real tokens. The padding of a rank is what its shard of the vocabulary holds beyond them.
    """
    if not hasattr(model, "compute_language_model_loss"):
        return

    def compute_language_model_loss(labels: Tensor, logits: Tensor) -> Tensor:
        """labels [b, s], logits [s, b, V / tp] -> -token_logps [b, s]."""
        logits = logits.float()
        local_size = logits.shape[-1]
        first = parallel_state.get_tensor_model_parallel_rank() * local_size
        num_real = max(0, vocab_size - first)
        if num_real < local_size:
            # In place: the cross entropy below overwrites its logits anyway, and a copy would be the largest tensor of
            # the step.
            logits[..., num_real:] = torch.finfo(logits.dtype).min
        losses: Tensor = tensor_parallel.vocab_parallel_cross_entropy(logits, labels.transpose(0, 1).contiguous())
        return losses.transpose(0, 1).contiguous()

    instance: Any = model
    instance.compute_language_model_loss = compute_language_model_loss
