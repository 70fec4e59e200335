"""Grouped queries with and without repeated keys and values."""

import pytest
import torch

from megatron_spin.models.attention import causal_attention, must_repeat_groups


@pytest.mark.parametrize(
    ("device", "dtype", "masked", "expected"),
    [
        ("cuda", torch.float32, False, True),
        ("cuda", torch.bfloat16, True, True),
        ("cuda", torch.bfloat16, False, False),  # flash attention
        ("cpu", torch.float32, True, False),
    ],
)
def test_where_groups_are_repeated(device: str, dtype: torch.dtype, masked: bool, expected: bool) -> None:
    assert must_repeat_groups(device, dtype, masked=masked) is expected


@pytest.mark.parametrize("masked", [False, True])
def test_repeated_groups_give_the_same_values_and_gradients(masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 6, 9, 8), (2, 2, 9, 8), (2, 2, 9, 8)]
    given = [torch.randn(shape, generator=generator) for shape in shapes]
    distance = torch.arange(9)[:, None] - torch.arange(9)[None, :]
    window = (distance >= 0) & (distance <= 3) if masked else None
    results = []
    for repeat in (False, True):
        inputs = [tensor.clone().requires_grad_() for tensor in given]
        output = causal_attention(*inputs, window=window, scale=0.3, repeat=repeat)
        output.square().sum().backward()
        results.append([output.detach(), *(tensor.grad for tensor in inputs)])
    for plain, repeated in zip(*results, strict=True):
        torch.testing.assert_close(repeated, plain, rtol=1e-5, atol=1e-6)
