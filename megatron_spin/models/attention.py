"""Core attention of the local layer spec: torch's scaled dot product attention, causal, with Mistral's sliding window."""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megatron_spin.errors import ConfigError


class SDPAttention(torch.nn.Module):
    """Causal attention over right-padded batches, on CPU and CUDA.

    No mask is ever passed: padding is on the right, so no real position sees it. Grouped queries are not repeated in memory.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, *_: Any, softmax_scale: float | None = None, **__: Any
    ) -> None:
        # Megatron passes a growing list of further arguments (mask type, communication type, groups ...); none changes this function.
        super().__init__()
        self.softmax_scale = softmax_scale
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size if windowed else None
        ours = {
            "attention_dropout": 0,
            "softmax_type": "vanilla",
            "apply_query_key_layer_scaling": False,
            "context_parallel_size": 1,
        }
        for name, value in ours.items():
            if getattr(config, name) != value:
                raise ConfigError(
                    f"the local layer spec's attention computes {name}={value!r} only, not {getattr(config, name)!r}"
                )

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
        """[s, s] of bool, True where the query sees the key, or None where the window holds all anyway."""
        if self.window is None or self.window[0] < 0 or self.window[0] >= length - 1:
            return None
        position = torch.arange(length, device=device)
        distance = position[:, None] - position[None, :]
        return (distance >= 0) & (distance <= self.window[0])
