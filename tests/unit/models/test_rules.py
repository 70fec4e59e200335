"""The rules on plain tensors: split and merge are inverse at every size, and each row is where Megatron expects it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_spin.errors import CheckpointError
from megatron_spin.models.rules import (
    Direct,
    GateUp,
    Geometry,
    QueryKeyValue,
    RowParallel,
    Rule,
    VocabParallel,
)


def geometry(
    *, heads: int = 4, groups: int = 2, head_dim: int = 4, vocab_size: int = 83, tied: bool = False
) -> Geometry:
    return Geometry(
        num_layers=2,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=head_dim,
        vocab_size=vocab_size,
        tied=tied,
    )


def numbered(*shape: int, start: int = 0) -> torch.Tensor:
    """A tensor whose elements are all different."""
    count = int(torch.Size(shape).numel())
    return torch.arange(start, start + count, dtype=torch.float32).reshape(shape)


def shards_of(
    rule: Rule, tensors: list[torch.Tensor], *, tp_size: int, local: tuple[int, ...], sizes: Geometry
) -> list[torch.Tensor]:
    assert rule.hf_shapes(local, tp_size=tp_size, geometry=sizes) == [tuple(tensor.shape) for tensor in tensors]
    shards = [
        rule.split(tensors, tp_rank=rank, tp_size=tp_size, local=local, geometry=sizes) for rank in range(tp_size)
    ]
    assert all(tuple(shard.shape) == local for shard in shards)
    return shards


def assert_inverse(
    rule: Rule, tensors: list[torch.Tensor], *, tp_size: int, local: tuple[int, ...], sizes: Geometry
) -> None:
    merged = rule.merge(shards_of(rule, tensors, tp_size=tp_size, local=local, sizes=sizes), geometry=sizes)
    assert len(merged) == len(tensors)
    for back, original in zip(merged, tensors, strict=True):
        assert torch.equal(back, original)


TP = st.integers(1, 8)
SMALL = st.integers(1, 5)
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "vocab_size": 83,
}


@settings(max_examples=60)
@given(tp_size=TP, rows=SMALL, columns=SMALL, bias=st.booleans())
def test_row_gate_up_and_direct_are_inverse(tp_size: int, rows: int, columns: int, bias: bool) -> None:
    sizes = geometry()
    rest = () if bias else (columns,)
    assert_inverse(
        RowParallel(("w",)), [numbered(rows, columns * tp_size)], tp_size=tp_size, local=(rows, columns), sizes=sizes
    )
    gate, up = numbered(rows * tp_size, *rest), numbered(rows * tp_size, *rest, start=10_000)
    assert_inverse(GateUp(("g", "u")), [gate, up], tp_size=tp_size, local=(2 * rows, *rest), sizes=sizes)
    assert_inverse(Direct(("n",)), [numbered(rows)], tp_size=tp_size, local=(rows,), sizes=sizes)


@settings(max_examples=60)
@given(tp_size=TP, per_group=SMALL, groups=st.integers(1, 8), head_dim=SMALL, hidden=SMALL, bias=st.booleans())
def test_query_key_value_is_inverse_even_with_fewer_groups_than_ranks(
    tp_size: int, per_group: int, groups: int, head_dim: int, hidden: int, bias: bool
) -> None:
    # Megatron takes any TP that divides the heads; where the groups do not divide, a rank's rows end inside a group.
    rows = (per_group + 2) * groups * head_dim * tp_size
    sizes = geometry(heads=per_group * groups, groups=groups, head_dim=head_dim * tp_size)
    rest = () if bias else (hidden,)
    query = numbered(per_group * groups * head_dim * tp_size, *rest)
    key = numbered(groups * head_dim * tp_size, *rest, start=100_000)
    value = numbered(groups * head_dim * tp_size, *rest, start=200_000)
    assert_inverse(
        QueryKeyValue(("q", "k", "v")),
        [query, key, value],
        tp_size=tp_size,
        local=(rows // tp_size, *rest),
        sizes=sizes,
    )


@settings(max_examples=60)
@given(tp_size=TP, vocab_size=st.integers(1, 200), multiple=st.integers(1, 64), hidden=SMALL)
def test_vocabulary_padding_is_zero_and_never_merged(tp_size: int, vocab_size: int, multiple: int, hidden: int) -> None:
    padded = -(-vocab_size // (multiple * tp_size)) * multiple * tp_size
    sizes, rule, weight = geometry(vocab_size=vocab_size), VocabParallel(("w",)), numbered(vocab_size, hidden, start=1)
    shards = shards_of(rule, [weight], tp_size=tp_size, local=(padded // tp_size, hidden), sizes=sizes)
    whole = torch.cat(shards)
    assert torch.equal(whole[:vocab_size], weight)
    assert not whole[vocab_size:].any()
    shards = [shard.clone() for shard in shards]
    # Whatever is in the padding stays out.
    shards[-1][max(0, vocab_size - padded + shards[-1].shape[0]) :] = float("nan")
    assert torch.equal(rule.merge(shards, geometry=sizes)[0], weight)


def test_query_key_value_order_is_megatrons() -> None:
    """4 heads in 2 groups of head size 1: group 0 holds q0 q1 k0 v0, group 1 q2 q3 k1 v1."""
    sizes = geometry(head_dim=1)
    query, key, value = torch.tensor([0.0, 1, 2, 3]), torch.tensor([10.0, 11]), torch.tensor([20.0, 21])
    rule = QueryKeyValue(("q", "k", "v"))
    assert [shard.tolist() for shard in shards_of(rule, [query, key, value], tp_size=2, local=(4,), sizes=sizes)] == [
        [0, 1, 10, 20],
        [2, 3, 11, 21],
    ]


def test_gate_up_order_is_megatrons() -> None:
    """Each rank holds its gate rows, then its up rows."""
    shards = shards_of(
        GateUp(("g", "u")), [torch.tensor([0.0, 1]), torch.tensor([10.0, 11])], tp_size=2, local=(2,), sizes=geometry()
    )
    assert [shard.tolist() for shard in shards] == [[0, 10], [1, 11]]


def test_a_vocabulary_larger_than_the_model_has_another_shape() -> None:
    assert VocabParallel(("w",)).hf_shapes((40, 3), tp_size=2, geometry=geometry(vocab_size=83)) == [(80, 3)]


def test_geometry_defaults_and_missing_keys() -> None:
    sizes = Geometry.from_hf({key: value for key, value in CONFIG.items() if key != "num_key_value_heads"})
    assert (sizes.num_query_groups, sizes.head_dim, sizes.tied) == (4, 8, False)
    with pytest.raises(CheckpointError, match="no vocab_size"):
        Geometry.from_hf({key: value for key, value in CONFIG.items() if key != "vocab_size"})
