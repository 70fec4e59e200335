"""The registry of families and their tables: names, tied outputs, and what has no counterpart."""

import re
from typing import Any

import pytest

from megatron_spin.errors import CheckpointError
from megatron_spin.models.families import families, family_of


def test_local_and_transformer_engine_names_give_the_same_tensors() -> None:
    family = families()["llama"]
    for local, fused in [
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    ]:
        names = [family.find(f"decoder.layers.7.{name}", tied=False).rule.hf_names(layer=7) for name in (local, fused)]
        assert names[0] == names[1]
        assert names[0][0].startswith("model.layers.7.")


def test_a_tied_output_layer_is_the_embedding() -> None:
    family = families()["llama"]
    assert family.find("output_layer.weight", tied=True).rule.hf == ("model.embed_tokens.weight",)
    assert family.find("output_layer.weight", tied=False).rule.hf == ("lm_head.weight",)


def test_numbers_in_a_name_are_taken_out() -> None:
    match = families()["llama"].find("decoder.layers.31.mlp.linear_fc2.weight", tied=False)
    assert match.pattern == "decoder.layers.{layer}.mlp.linear_fc2.weight"
    assert (match.layer, match.expert) == (31, None)
    assert families()["llama"].find("decoder.final_layernorm.weight", tied=False).layer is None


@pytest.mark.parametrize(("window", "fields"), [(4096, (4095, 0)), (None, None)])
def test_only_mistral_has_a_window(window: int | None, fields: tuple[int, int] | None) -> None:
    """Whatever a Llama's config.json says, its code has none; Megatron does not count the position itself."""
    hf_config: dict[str, Any] = {
        "vocab_size": 83,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "sliding_window": window,
    }
    assert families()["mistral"].transformer_fields(hf_config).get("window_size") == fields
    assert families()["llama"].transformer_fields(hf_config).get("window_size") is None


def test_an_unmapped_parameter_is_an_error() -> None:
    with pytest.raises(
        CheckpointError,
        match=r"decoder\.layers\.0\.self_attention\.q_layernorm\.weight has no Hugging Face counterpart",
    ):
        families()["llama"].find("decoder.layers.0.self_attention.q_layernorm.weight", tied=False)
    with pytest.raises(CheckpointError, match=r"linear_qkv\.bias"):
        families()["mistral"].find("decoder.layers.0.self_attention.linear_qkv.bias", tied=False)


def test_unknown_families_and_quantized_models_are_refused() -> None:
    with pytest.raises(CheckpointError, match=re.escape("model_type 'gpt2' in config.json is none of llama, mistral")):
        family_of({"model_type": "gpt2"})
    with pytest.raises(CheckpointError, match="quantization_config"):
        family_of({"model_type": "llama", "quantization_config": {}})
