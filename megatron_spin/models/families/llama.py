"""Llama, and what its relatives share with it."""

from typing import Any

import torch

from megatron_spin.errors import ConfigError
from megatron_spin.models.family import Family, HfConfig, refuse_missing
from megatron_spin.models.rules import Direct, GateUp, Geometry, QueryKeyValue, RowParallel, Rule, VocabParallel

LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The constants that Megatron's Llama 3 RoPE scaling has in its code; only ``factor`` can be chosen."""


def refuse(hf_config: HfConfig) -> None:
    """Raises ConfigError for what is missing and for what GPTModel would silently leave out."""
    refuse_missing(
        hf_config,
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
        "max_position_embeddings",
    )
    rope_arguments(hf_config)
    for name in ("attention_bias", "mlp_bias"):
        if hf_config.get(name):
            raise ConfigError(f"the model's {name}=true is not supported: use a model without biases")
    if hf_config.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"the model's hidden_act={hf_config['hidden_act']!r} is not supported: silu is")
    if len(set(hf_config.get("layer_types") or ())) > 1:
        raise ConfigError(
            "the model's layer_types differ from layer to layer, which is not supported: "
            "use a model with one kind of layer"
        )


def transformer_fields(hf_config: HfConfig) -> dict[str, Any]:
    """A ``config.json`` as fields of TransformerConfig.

    Llama's code has no sliding window, whatever its ``config.json`` says.
    """
    geometry = Geometry.from_hf(hf_config)
    return {
        "num_layers": geometry.num_layers,
        "hidden_size": hf_config["hidden_size"],
        "ffn_hidden_size": hf_config["intermediate_size"],
        "num_attention_heads": geometry.num_attention_heads,
        "num_query_groups": geometry.num_query_groups,
        "kv_channels": geometry.head_dim,
        "layernorm_epsilon": hf_config["rms_norm_eps"],
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
    }


def gpt_arguments(hf_config: HfConfig) -> dict[str, Any]:
    """A ``config.json`` as further arguments of GPTModel."""
    return {
        "max_sequence_length": hf_config["max_position_embeddings"],
        "position_embedding_type": "rope",
        **rope_arguments(hf_config),
    }


def rope_arguments(hf_config: HfConfig) -> dict[str, Any]:
    """GPTModel's arguments for the RoPE of a ``config.json``.

    Raises:
        ConfigError: a scaling that Megatron does not compute.
    """
    # transformers 5 writes rope_parameters; transformers 4 wrote rope_scaling, with rope_theta beside it.
    rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    rotary_base = rope.get("rope_theta", hf_config.get("rope_theta", 10000.0))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            f"the model's partial_rotary_factor={rope['partial_rotary_factor']} is not supported: "
            "use a model without it"
        )
    if rope_type == "default":
        return {"rotary_base": rotary_base}
    if rope_type == "linear":
        return {"rotary_base": rotary_base, "seq_len_interpolation_factor": rope["factor"]}
    if rope_type == "llama3":
        for name, fixed in LLAMA3_ROPE.items():
            if rope.get(name) != fixed:
                raise ConfigError(
                    f"the model's RoPE scaling has {name}={rope.get(name)}: Megatron computes llama3 scaling with "
                    f"{fixed} only"
                )
        return {"rotary_base": rotary_base, "rope_scaling": True, "rope_scaling_factor": rope["factor"]}
    raise ConfigError(f"the model's RoPE scaling {rope_type!r} is not supported: default, linear and llama3 are")


# The rows of biases serve a user's own model providers: ``refuse`` accepts no model with biases.
RULES: dict[str, Rule] = {
    "embedding.word_embeddings.weight": VocabParallel(("model.embed_tokens.weight",)),
    "decoder.layers.{layer}.input_layernorm.weight": Direct(("model.layers.{layer}.input_layernorm.weight",)),
    "decoder.layers.{layer}.self_attention.linear_qkv.layer_norm_weight": Direct(
        ("model.layers.{layer}.input_layernorm.weight",)
    ),
    "decoder.layers.{layer}.self_attention.linear_qkv.weight": QueryKeyValue(
        (
            "model.layers.{layer}.self_attn.q_proj.weight",
            "model.layers.{layer}.self_attn.k_proj.weight",
            "model.layers.{layer}.self_attn.v_proj.weight",
        )
    ),
    "decoder.layers.{layer}.self_attention.linear_qkv.bias": QueryKeyValue(
        (
            "model.layers.{layer}.self_attn.q_proj.bias",
            "model.layers.{layer}.self_attn.k_proj.bias",
            "model.layers.{layer}.self_attn.v_proj.bias",
        )
    ),
    "decoder.layers.{layer}.self_attention.linear_proj.weight": RowParallel(
        ("model.layers.{layer}.self_attn.o_proj.weight",)
    ),
    "decoder.layers.{layer}.self_attention.linear_proj.bias": Direct(("model.layers.{layer}.self_attn.o_proj.bias",)),
    "decoder.layers.{layer}.pre_mlp_layernorm.weight": Direct(
        ("model.layers.{layer}.post_attention_layernorm.weight",)
    ),
    "decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight": Direct(
        ("model.layers.{layer}.post_attention_layernorm.weight",)
    ),
    "decoder.layers.{layer}.mlp.linear_fc1.weight": GateUp(
        ("model.layers.{layer}.mlp.gate_proj.weight", "model.layers.{layer}.mlp.up_proj.weight")
    ),
    "decoder.layers.{layer}.mlp.linear_fc1.bias": GateUp(
        ("model.layers.{layer}.mlp.gate_proj.bias", "model.layers.{layer}.mlp.up_proj.bias")
    ),
    "decoder.layers.{layer}.mlp.linear_fc2.weight": RowParallel(("model.layers.{layer}.mlp.down_proj.weight",)),
    "decoder.layers.{layer}.mlp.linear_fc2.bias": Direct(("model.layers.{layer}.mlp.down_proj.bias",)),
    "decoder.final_layernorm.weight": Direct(("model.norm.weight",)),
    "output_layer.weight": VocabParallel(("lm_head.weight",)),
}

FAMILY = Family(
    model_types=("llama",),
    refuse=refuse,
    transformer_fields=transformer_fields,
    gpt_arguments=gpt_arguments,
    rules=RULES,
)
