"""The vocabulary's padding: rows that exist only so that tensor parallel ranks hold equal shares."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_spin.models.cross_entropy import vocab_parallel_cross_entropy


def mask_padding(model: torch.nn.Module, vocab_size: int, group: ProcessGroup) -> None:
    """Makes ``model.forward(labels=...)`` give ``-token_logps`` [b, s] in fp32, over the real vocabulary only.

    Megatron pads the vocabulary and leaves the padding in the softmax, where it would take probability from real
    tokens.

    This patches the instance: its method ``compute_language_model_loss`` is replaced, the class stays as it is, so a
    user's own subclass of GPTModel gets the same loss. Models without that method, which are not Megatron's
    LanguageModule, are left alone and must mask by themselves.

    Args:
        vocab_size: real tokens. The padding of a rank is what its shard of the vocabulary holds beyond them.
        group: the tensor parallel ranks.
    """
    if not hasattr(model, "compute_language_model_loss"):
        return

    def compute_language_model_loss(labels: Tensor, logits: Tensor) -> Tensor:
        """labels [b, s], logits [s, b, V / tp] -> -token_logps [b, s]."""
        target = labels.transpose(0, 1).contiguous()
        losses = vocab_parallel_cross_entropy(logits.contiguous(), target, vocab_size=vocab_size, group=group)
        return losses.transpose(0, 1).contiguous()

    instance: Any = model
    instance.compute_language_model_loss = compute_language_model_loss
