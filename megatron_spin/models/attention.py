"""Core attention of the local layer spec: torch's scaled dot product attention, causal, with a sliding window."""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megatron_spin.errors import ConfigError

COMPUTED = {
    "attention_dropout": 0,
    "softmax_type": "vanilla",
    "apply_query_key_layer_scaling": False,
    "context_parallel_size": 1,
}
"""Fields of TransformerConfig for which this attention computes only one value."""


class SDPAttention(torch.nn.Module):
    """Causal attention over right-padded batches, on CPU and CUDA.

    It takes no padding mask: padding is on the right, so causality hides it from every real position. Keys and values
    of grouped queries are not repeated in memory.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, *_: Any, softmax_scale: float | None = None, **__: Any
    ) -> None:
        # Megatron passes a growing list of further arguments (mask type, communication type, groups ...); none of them
        # changes this function.
        super().__init__()
        for name, value in COMPUTED.items():
            if getattr(config, name) != value:
                raise ConfigError(
                    f"the local layer spec's attention computes {name}={value!r} only, not {getattr(config, name)!r}"
                )
        self.softmax_scale = softmax_scale
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size if windowed else None
        """(positions before, positions after), or None; -1 is unlimited."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *_: Any,
        packed_seq_params: Any = None,
        **__: Any,
    ) -> Tensor:
        """[s, b, heads, d] each (key and value with their own number of heads) -> [s, b, heads * d]."""
        if packed_seq_params is not None:
            raise NotImplementedError("packed sequences need the transformer_engine layer spec")
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))  # [b, heads, s, d]
        length = q.shape[2]
        window = self._window_mask(length, q.device)
        context = torch.nn.functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=window,
            is_causal=window is None,
            scale=self.softmax_scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return context.permute(2, 0, 1, 3).reshape(length, q.shape[0], -1)

    def _window_mask(self, length: int, device: torch.device) -> Tensor | None:
        """[s, s] bool, True where the query sees the key; None if every query sees all keys before it."""
        if self.window is None or self.window[0] < 0 or self.window[0] >= length - 1:
            return None
        position = torch.arange(length, device=device)
        distance = position[:, None] - position[None, :]
        return (distance >= 0) & (distance <= self.window[0])
