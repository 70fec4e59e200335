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
    of grouped queries are repeated in memory only where :func:`must_repeat_groups` says so.
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
        repeat = must_repeat_groups(q.device.type, q.dtype, masked=window is not None)
        context = causal_attention(q, k, v, window=window, scale=self.softmax_scale, repeat=repeat)
        return context.permute(2, 0, 1, 3).reshape(length, q.shape[0], -1)

    def _window_mask(self, length: int, device: torch.device) -> Tensor | None:
        """[s, s] bool, True where the query sees the key; None if every query sees all keys before it."""
        if self.window is None or self.window[0] < 0 or self.window[0] >= length - 1:
            return None
        position = torch.arange(length, device=device)
        distance = position[:, None] - position[None, :]
        return (distance >= 0) & (distance <= self.window[0])


def must_repeat_groups(device_type: str, dtype: torch.dtype, *, masked: bool) -> bool:
    """Whether grouped queries would run torch's math kernel, which holds [b, heads, s, s] several times.

    Of the fused kernels on CUDA only flash attention takes fewer heads of keys than of queries, and it takes neither
    fp32 nor a mask. The memory-efficient kernel takes both, once there are as many heads of keys.
    """
    return device_type == "cuda" and (masked or dtype == torch.float32)


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, *, window: Tensor | None, scale: float | None, repeat: bool
) -> Tensor:
    """torch's scaled dot product attention, [b, heads, s, d], over grouped queries.

    Args:
        window: [s, s] bool, True where the query sees the key; None: every query sees all keys before it.
        repeat: repeats the heads of keys and values in memory, which changes no result beyond rounding.
    """
    is_grouped = query.shape[1] != key.shape[1]
    if is_grouped and repeat:
        group_size = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(group_size, dim=1) for tensor in (key, value))
    return torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=window,
        is_causal=window is None,
        scale=scale,
        enable_gqa=is_grouped and not repeat,
    )
