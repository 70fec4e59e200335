"""The rules on plain tensors: split and merge are inverse for every tensor parallel size, and put each row where Megatron looks for it."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from megatron_spin.errors import CheckpointError
from megatron_spin.hf.assets import copy_assets, set_dtype, stored_dtype
from megatron_spin.hf.files import TensorFiles
from megatron_spin.models.families import FAMILIES, family_of
from megatron_spin.models.rules import (
    ColumnParallel,
    Direct,
    GateUp,
    Geometry,
    QueryKeyValue,
    RowParallel,
    Rule,
    VocabParallel,
)

CONFIG = {
    "model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "vocab_size": 83,
}  # fmt: skip


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
    shards = [rule.split(tensors, rank=rank, tp_size=tp_size, local=local, geometry=sizes) for rank in range(tp_size)]
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


@settings(max_examples=60)
@given(tp_size=TP, rows=SMALL, columns=SMALL, bias=st.booleans())
def test_column_row_and_gate_up_are_inverse(tp_size: int, rows: int, columns: int, bias: bool) -> None:
    sizes = geometry()
    rest = () if bias else (columns,)
    assert_inverse(
        ColumnParallel(("w",)), [numbered(rows * tp_size, *rest)], tp_size=tp_size, local=(rows, *rest), sizes=sizes
    )
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
    shards[-1][max(0, vocab_size - padded + shards[-1].shape[0]) :] = float(
        "nan"
    )  # whatever stands in the padding stays out
    assert torch.equal(rule.merge(shards, geometry=sizes)[0], weight)


def test_query_key_value_order_is_megatrons() -> None:
    """4 heads in 2 groups of head size 1: group 0 holds q0 q1 k0 v0, group 1 q2 q3 k1 v1."""
    sizes = geometry(head_dim=1)
    query, key, value = torch.tensor([0.0, 1, 2, 3]), torch.tensor([10.0, 11]), torch.tensor([20.0, 21])
    rule = QueryKeyValue(("q", "k", "v"))
    assert [shard.tolist() for shard in shards_of(rule, [query, key, value], tp_size=2, local=(4,), sizes=sizes)] == [
        [0, 1, 10, 20], [2, 3, 11, 21],
    ]  # fmt: skip


def test_gate_up_order_is_megatrons() -> None:
    """Each rank holds its gate rows, then its up rows."""
    shards = shards_of(
        GateUp(("g", "u")), [torch.tensor([0.0, 1]), torch.tensor([10.0, 11])], tp_size=2, local=(2,), sizes=geometry()
    )
    assert [shard.tolist() for shard in shards] == [[0, 10], [1, 11]]


def test_a_vocabulary_larger_than_the_model_has_another_shape() -> None:
    assert VocabParallel(("w",)).hf_shapes((40, 3), tp_size=2, geometry=geometry(vocab_size=83)) == [(80, 3)]


def test_local_and_transformer_engine_names_give_the_same_tensors() -> None:
    sizes, family = geometry(), FAMILIES["llama"]
    for local, fused in [
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    ]:
        names = [family.find(f"decoder.layers.7.{name}", sizes)[2].hf_names(7) for name in (local, fused)]
        assert names[0] == names[1]
        assert names[0][0].startswith("model.layers.7.")


def test_a_tied_output_layer_is_the_embedding() -> None:
    family = FAMILIES["llama"]
    assert family.find("output_layer.weight", geometry(tied=True))[2].hf == ("model.embed_tokens.weight",)
    assert family.find("output_layer.weight", geometry(tied=False))[2].hf == ("lm_head.weight",)


def test_an_unmapped_parameter_is_an_error() -> None:
    with pytest.raises(
        CheckpointError,
        match=r"decoder\.layers\.0\.self_attention\.q_layernorm\.weight has no Hugging Face counterpart",
    ):
        FAMILIES["llama"].find("decoder.layers.0.self_attention.q_layernorm.weight", geometry())
    with pytest.raises(CheckpointError, match=r"linear_qkv\.bias"):
        FAMILIES["mistral"].find("decoder.layers.0.self_attention.linear_qkv.bias", geometry())


def test_unknown_families_and_quantized_models_are_refused() -> None:
    with pytest.raises(CheckpointError, match=re.escape("model_type 'gpt2' in config.json is none of llama, mistral")):
        family_of({"model_type": "gpt2"})
    with pytest.raises(CheckpointError, match="quantization_config"):
        family_of({"model_type": "llama", "quantization_config": {}})


def test_geometry_defaults_and_missing_keys() -> None:
    sizes = Geometry.from_hf({key: value for key, value in CONFIG.items() if key != "num_key_value_heads"})
    assert (sizes.num_query_groups, sizes.head_dim, sizes.tied) == (4, 8, False)
    with pytest.raises(CheckpointError, match="no vocab_size"):
        Geometry.from_hf({key: value for key, value in CONFIG.items() if key != "vocab_size"})


def test_files_that_are_missing_or_truncated_name_themselves(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor"):
        TensorFiles(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({"a": numbered(100)}, path)
    with TensorFiles(tmp_path) as files:
        assert (files.names, files.shape("a"), files.dtype("a")) == (["a"], (100,), torch.float32)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is corrupted or truncated"):
        TensorFiles(tmp_path)
    path.unlink()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"model-00001-of-00001\.safetensors is missing"):
        TensorFiles(tmp_path)


def test_quantized_tensors_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with TensorFiles(tmp_path) as files, pytest.raises(CheckpointError, match=r"tensor a .* is not floating point"):
        files.read("a")


def test_assets_are_copied_and_weights_are_not(tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    (source / "additional_chat_templates").mkdir(parents=True)
    kept = [
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
        "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "additional_chat_templates/tool.jinja",
    ]  # fmt: skip
    left = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "README.md", "training_args.bin"]
    for name in kept + left:
        (source / name).write_bytes(name.encode() + b"\xff")
    assert copy_assets(source, copy) == sorted(kept)
    assert sorted(str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()) == sorted(kept)
    assert all((copy / name).read_bytes() == name.encode() + b"\xff" for name in kept)


def test_set_dtype_changes_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"z": [1, 1e-05], "torch_dtype": "float32", "name": "é"}')
    set_dtype(tmp_path, "fp32")
    assert path.read_text() == '{"z": [1, 1e-05], "torch_dtype": "float32", "name": "é"}'
    set_dtype(tmp_path, "bf16")
    assert path.read_text() == '{\n  "z": [\n    1,\n    1e-05\n  ],\n  "torch_dtype": "bfloat16",\n  "name": "é"\n}\n'
    assert (stored_dtype({"dtype": "bfloat16"}), stored_dtype({"torch_dtype": "float16"}), stored_dtype({})) == (
        "bf16",
        "fp32",
        "fp32",
    )
