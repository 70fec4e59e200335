"""Experts over tensor and expert parallel ranks, on plain tensors: the ranks together hold each expert once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_spin.models.rules import Geometry, Rule, global_expert
from tests.support.mixtral import EXPERT, FAMILY, GROUPED

LAYER = 5
LOCAL_NAMES = (f"{EXPERT}linear_fc1.weight", f"{EXPERT}linear_fc2.weight")
GROUPED_NAMES = (f"{GROUPED}linear_fc1.weight{{expert}}", f"{GROUPED}linear_fc2.weight{{expert}}")


def geometry(num_experts: int) -> Geometry:
    return Geometry(
        num_layers=8,
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=4,
        vocab_size=83,
        tied=False,
        num_experts=num_experts,
    )


@given(ep_size=st.integers(1, 8), num_local=st.integers(1, 8))
def test_every_expert_is_on_one_rank(ep_size: int, num_local: int) -> None:
    numbers = []
    for ep_rank in range(ep_size):
        for local in range(num_local):
            numbers.append(global_expert(local, ep_rank=ep_rank, ep_size=ep_size, num_experts=ep_size * num_local))
    assert numbers == list(range(ep_size * num_local))


@pytest.mark.parametrize("names", [LOCAL_NAMES, GROUPED_NAMES], ids=["local_experts", "grouped"])
@settings(max_examples=30)
@given(
    tp_size=st.integers(1, 4),
    ep_size=st.integers(1, 4),
    num_local=st.integers(1, 3),
    ffn=st.integers(1, 3),
    hidden=st.integers(1, 3),
)
def test_split_and_merge_are_inverse_over_tensor_and_expert_ranks(
    names: tuple[str, str], tp_size: int, ep_size: int, num_local: int, ffn: int, hidden: int
) -> None:
    """``parameters[ep_rank][tp_rank]`` are the names and shards that such a rank of Megatron's would hold."""
    sizes = geometry(ep_size * num_local)
    fc1, fc2 = names
    local_shapes = {fc1: (2 * ffn, hidden), fc2: (hidden, ffn)}
    originals: dict[str, torch.Tensor] = {}
    for expert in range(sizes.num_experts):
        prefix = f"model.layers.{LAYER}.block_sparse_moe.experts.{expert}"
        originals[f"{prefix}.w1.weight"] = torch.rand(ffn * tp_size, hidden)
        originals[f"{prefix}.w3.weight"] = torch.rand(ffn * tp_size, hidden)
        originals[f"{prefix}.w2.weight"] = torch.rand(hidden, ffn * tp_size)

    parameters: list[list[dict[str, torch.Tensor]]] = []
    for ep_rank in range(ep_size):
        parameters.append([{} for _ in range(tp_size)])
        for pattern in names:
            for local in range(num_local):
                name = pattern.format(layer=LAYER, expert=local)
                for tp_rank in range(tp_size):
                    rule, hf_names = found(name, ep_rank=ep_rank, ep_size=ep_size, sizes=sizes)
                    parameters[ep_rank][tp_rank][name] = rule.split(
                        [originals[hf_name] for hf_name in hf_names],
                        tp_rank=tp_rank,
                        tp_size=tp_size,
                        local=local_shapes[pattern],
                        geometry=sizes,
                    )

    merged: dict[str, torch.Tensor] = {}
    for ep_rank, ranks in enumerate(parameters):
        for name in ranks[0]:
            rule, hf_names = found(name, ep_rank=ep_rank, ep_size=ep_size, sizes=sizes)
            shards = [rank[name] for rank in ranks]
            shapes = rule.hf_shapes(tuple(shards[0].shape), tp_size=tp_size, geometry=sizes)
            for hf_name, shape, tensor in zip(hf_names, shapes, rule.merge(shards, geometry=sizes), strict=True):
                assert hf_name not in merged
                assert tuple(tensor.shape) == shape
                merged[hf_name] = tensor
    assert merged.keys() == originals.keys()
    for hf_name, tensor in originals.items():
        assert torch.equal(merged[hf_name], tensor), hf_name


def found(name: str, *, ep_rank: int, ep_size: int, sizes: Geometry) -> tuple[Rule, tuple[str, ...]]:
    """The rule of a Megatron parameter of that expert parallel rank, and the Hugging Face names it stands for."""
    match = FAMILY.find(name, tied=False)
    assert match.layer == LAYER
    assert match.expert is not None
    expert = global_expert(match.expert, ep_rank=ep_rank, ep_size=ep_size, num_experts=sizes.num_experts)
    return match.rule, match.rule.hf_names(layer=match.layer, expert=expert)
