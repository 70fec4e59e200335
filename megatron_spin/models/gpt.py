"""A Hugging Face ``config.json`` as Megatron's TransformerConfig and GPTModel: Llama and Mistral."""

import dataclasses
import difflib
import warnings
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from megatron_spin.config import Config
from megatron_spin.errors import ConfigError
from megatron_spin.models.attention import SDPAttention
from megatron_spin.models.norm import RMSNorm
from megatron_spin.models.precision import precision_fields
from megatron_spin.parallel.dims import ParallelDims
from megatron_spin.parallel.kernels import layer_spec

OWNED = {
    **dict.fromkeys(("params_dtype", "pipeline_dtype", "bf16", "fp16", "autocast_dtype"), "precision.dtype"),
    **dict.fromkeys(("fp8", "fp4"), "precision.fp8"),
    **{
        name: f"parallel.{name}"
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    },
    "sequence_parallel": "parallel.sequence_parallel",
}
"""Fields of TransformerConfig that another key of the configuration sets: two places would contradict each other."""
FIXED = (
    "virtual_pipeline_model_parallel_size",
    "calculate_per_token_loss",
    "hidden_dropout",
    "attention_dropout",
    "add_bias_linear",
)
"""Fields that the trainer's own correctness rests on."""
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The constants that Megatron's Llama 3 RoPE scaling has in its code; only ``factor`` can be chosen."""


def padded_vocab_size(vocab_size: int, *, divisible_by: int, tensor_parallel: int) -> int:
    """Rows of the embedding: ``vocab_size`` rounded up to a multiple of ``divisible_by * tensor_parallel``, as Megatron does."""
    multiple = divisible_by * tensor_parallel
    return -(-vocab_size // multiple) * multiple


def transformer_config(hf_config: dict[str, Any], config: Config, dims: ParallelDims) -> TransformerConfig:
    """Megatron's configuration of a Llama or Mistral, with ``model.transformer`` over it.

    Raises:
        ConfigError: an unknown field in ``model.transformer``, or something in ``hf_config`` that Megatron's GPTModel does not compute.
    """
    _refuse_unsupported(hf_config)
    _refuse_fields(config.model.transformer)
    on_cpu = dims.device.type == "cpu"
    heads, window = hf_config["num_attention_heads"], hf_config.get("sliding_window")
    fused = not on_cpu and layer_spec(config, dims.device) == "transformer_engine"
    values: dict[str, Any] = {
        "num_layers": hf_config["num_hidden_layers"],
        "hidden_size": hf_config["hidden_size"],
        "ffn_hidden_size": hf_config["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": hf_config.get("num_key_value_heads") or heads,
        "kv_channels": hf_config.get("head_dim") or hf_config["hidden_size"] // heads,
        "layernorm_epsilon": hf_config["rms_norm_eps"],
        # Hugging Face counts the position itself; only Mistral's code has a window, whatever a Llama's config.json says.
        "window_size": (window - 1, 0) if window and hf_config["model_type"] == "mistral" else None,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,  # scoring and training must be the same function
        "attention_dropout": 0.0,
        "bias_activation_fusion": fused,
        "bias_dropout_fusion": fused,
        "apply_rope_fusion": fused,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": fused,
        "use_cpu_initialization": on_cpu,
        "perform_initialization": False,  # the weights are loaded
        "calculate_per_token_loss": True,
        "tensor_model_parallel_size": config.parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": config.parallel.pipeline_model_parallel_size,
        "context_parallel_size": config.parallel.context_parallel_size,
        "sequence_parallel": config.parallel.sequence_parallel,
        **precision_fields(config),
        **config.model.transformer,
    }
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="full scope is deprecated")  # Megatron warns of its own default
            return TransformerConfig(**values)
    except (AssertionError, ValueError, TypeError) as error:
        raise ConfigError(f"model.transformer: Megatron's TransformerConfig refuses it: {error}") from error


def gpt_model(
    hf_config: dict[str, Any],
    config: Config,
    dims: ParallelDims,
    *,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None,
) -> GPTModel:
    """This pipeline stage's GPTModel, with uninitialized weights; the vocabulary is padded for tensor parallelism."""
    vocabulary = padded_vocab_size(
        hf_config["vocab_size"], divisible_by=config.model.make_vocab_size_divisible_by, tensor_parallel=dims.tp_size
    )
    transformer = transformer_config(hf_config, config, dims)
    return GPTModel(
        config=transformer,
        transformer_layer_spec=_layer_spec(transformer, layer_spec(config, dims.device), dims, vp_stage),
        vocab_size=vocabulary,
        max_sequence_length=hf_config["max_position_embeddings"],
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=bool(hf_config.get("tie_word_embeddings", False)),
        position_embedding_type="rope",
        **_rope_arguments(hf_config),
        vp_stage=vp_stage,
        pg_collection=dims.pg_collection,
    )


def _layer_spec(
    config: TransformerConfig, kind: str, dims: ParallelDims, vp_stage: int | None
) -> ModuleSpec | TransformerBlockSubmodules:
    if kind == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec()
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    spec.submodules.self_attention.submodules.core_attention = SDPAttention
    layers = get_num_layers_to_build(config, vp_stage, dims.pp_rank)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=RMSNorm)


def _leave_empty(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _rope(hf_config: dict[str, Any]) -> dict[str, Any]:
    """RoPE's settings with ``rope_theta`` and ``rope_type``, wherever this version of transformers wrote them."""
    scaling = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    theta = scaling.get("rope_theta", hf_config.get("rope_theta", 10000.0))
    return {**scaling, "rope_theta": theta, "rope_type": scaling.get("rope_type", scaling.get("type", "default"))}


def _rope_arguments(hf_config: dict[str, Any]) -> dict[str, Any]:
    """GPTModel's arguments for the RoPE of ``hf_config``.

    Raises:
        ConfigError: a scaling that Megatron does not compute.
    """
    rope = _rope(hf_config)
    arguments: dict[str, Any] = {"rotary_base": rope["rope_theta"]}
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            f"the model's partial_rotary_factor={rope['partial_rotary_factor']} is not supported: use a model without it"
        )
    if rope["rope_type"] == "linear":
        return {**arguments, "seq_len_interpolation_factor": rope["factor"]}
    if rope["rope_type"] == "llama3":
        for name, fixed in LLAMA3_ROPE.items():
            if rope.get(name) != fixed:
                raise ConfigError(
                    f"the model's RoPE scaling has {name}={rope.get(name)}: Megatron computes llama3 scaling with {fixed} only"
                )
        return {**arguments, "rope_scaling": True, "rope_scaling_factor": rope["factor"]}
    if rope["rope_type"] != "default":
        raise ConfigError(
            f"the model's RoPE scaling {rope['rope_type']!r} is not supported: default, linear and llama3 are"
        )
    return arguments


def _refuse_fields(transformer: dict[str, Any]) -> None:
    """Names the fields of ``model.transformer`` that do not exist or are not the user's to set there."""
    known = [field.name for field in dataclasses.fields(TransformerConfig)]
    for name, value in transformer.items():
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else "see megatron.core.transformer.TransformerConfig"
            raise ConfigError(f"model.transformer.{name} is not a field of Megatron's TransformerConfig: {hint}")
        if name in OWNED:
            raise ConfigError(f"model.transformer.{name}={value!r} must not be set there: set {OWNED[name]}")
        if name in FIXED:
            raise ConfigError(
                f"model.transformer.{name}={value!r} must not be set: training and scoring rest on its value here"
            )


def _refuse_unsupported(hf_config: dict[str, Any]) -> None:
    """Names what the model has and GPTModel would silently leave out, and what its config.json lacks."""
    kind = hf_config.get("model_type")
    if kind not in ("llama", "mistral"):
        raise ConfigError(f"model_type {kind!r} in the model's config.json is not supported: llama and mistral are")
    needed = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
    ]
    needed += ["max_position_embeddings"]
    # Their defaults in transformers (8 heads, a window of 4096) are no safe guess.
    needed += ["num_key_value_heads", "sliding_window"] if kind == "mistral" else []
    for name in needed:
        if name not in hf_config:
            raise ConfigError(f"the model's config.json lacks {name}: write it with transformers' save_pretrained")
    _rope_arguments(hf_config)
    for name in ("attention_bias", "mlp_bias"):
        if hf_config.get(name):
            raise ConfigError(f"the model's {name}=true is not supported: use a model without biases")
    if hf_config.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"the model's hidden_act={hf_config['hidden_act']!r} is not supported: silu is")
    if hf_config.get("layer_types") and len(set(hf_config["layer_types"])) > 1:
        raise ConfigError(
            "the model's layer_types differ from layer to layer, which is not supported: use a model with one kind of layer"
        )
