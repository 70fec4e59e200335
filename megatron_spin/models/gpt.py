"""A Hugging Face ``config.json`` as Megatron's TransformerConfig and GPTModel."""

import dataclasses
import difflib
import warnings
from typing import Any

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
from megatron_spin.models.families import family_of
from megatron_spin.models.family import HfConfig
from megatron_spin.models.norm import RMSNorm
from megatron_spin.models.precision import precision_fields, with_dtypes
from megatron_spin.parallel.dims import ParallelDims
from megatron_spin.parallel.kernels import layer_spec, weight_gradient_fusion

OWNED = {
    "params_dtype": "precision.dtype",
    "pipeline_dtype": "precision.dtype",
    "bf16": "precision.dtype",
    "fp16": "precision.dtype",
    "autocast_dtype": "precision.dtype",
    "fp8": "precision.fp8",
    "fp4": "precision.fp8",
    "tensor_model_parallel_size": "parallel.tensor_model_parallel_size",
    "pipeline_model_parallel_size": "parallel.pipeline_model_parallel_size",
    "context_parallel_size": "parallel.context_parallel_size",
    "sequence_parallel": "parallel.sequence_parallel",
    "deterministic_mode": "training.deterministic",
}
"""Fields of TransformerConfig that another config key sets, and that key: two places could contradict each other."""
DEPENDS = "training and scoring depend on its value"
FIXED = {
    "virtual_pipeline_model_parallel_size": DEPENDS,
    "calculate_per_token_loss": DEPENDS,
    "hidden_dropout": DEPENDS,
    "attention_dropout": DEPENDS,
    "add_bias_linear": DEPENDS,
    "init_model_with_meta_device": "weights are loaded into parameters that have memory",
}
"""Fields that must keep the value that they have here, and why."""


def padded_vocab_size(vocab_size: int, *, divisible_by: int, tensor_parallel: int) -> int:
    """Rows of the embedding: ``vocab_size`` rounded up to a multiple of ``divisible_by * tensor_parallel``."""
    multiple = divisible_by * tensor_parallel
    return -(-vocab_size // multiple) * multiple


def transformer_config(hf_config: HfConfig, config: Config, dims: ParallelDims) -> TransformerConfig:
    """Megatron's configuration of the model in ``hf_config``; ``model.transformer`` overrides single fields.

    Raises:
        CheckpointError: no family has the ``model_type`` of ``hf_config``.
        ConfigError: ``model.transformer`` has an unknown field, or ``hf_config`` something that GPTModel does not
            compute.
    """
    family = family_of(hf_config)
    family.refuse(hf_config)
    _refuse_fields(config.model.transformer)
    on_cpu = dims.device.type == "cpu"
    fused = not on_cpu and layer_spec(config, dims.device.type) == "transformer_engine"
    fusion = weight_gradient_fusion(config, dims.device.type)
    values: dict[str, Any] = {
        **family.transformer_fields(hf_config),
        "hidden_dropout": 0.0,  # scoring and training must be the same function
        "attention_dropout": 0.0,
        "bias_activation_fusion": fused,
        "bias_dropout_fusion": fused,
        "apply_rope_fusion": fused,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": fusion == "all",
        "persist_layer_norm": fused,
        "deterministic_mode": config.training.deterministic and not on_cpu,
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
            # Megatron warns about its own default.
            warnings.filterwarnings("ignore", message="full scope is deprecated")
            transformer = TransformerConfig(**with_dtypes(TransformerConfig, values, "model.transformer"))
    except (AssertionError, ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"model.transformer: Megatron's TransformerConfig refuses it: {error}") from error
    experts = transformer.expert_model_parallel_size
    if experts != dims.ep_size:
        raise ConfigError(
            f"model.transformer.expert_model_parallel_size={experts} does not fit the {dims.ep_size} expert parallel "
            "ranks of this run: remove it"
        )
    return transformer


def gpt_model(
    hf_config: HfConfig,
    config: Config,
    dims: ParallelDims,
    *,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None,
) -> GPTModel:
    """This pipeline stage's GPTModel, with uninitialized weights and the vocabulary padded for tensor parallelism.

    Raises:
        As :func:`transformer_config`.
    """
    transformer = transformer_config(hf_config, config, dims)
    family = family_of(hf_config)
    geometry = family.geometry(hf_config)
    vocabulary = padded_vocab_size(
        geometry.vocab_size,
        divisible_by=config.model.make_vocab_size_divisible_by,
        tensor_parallel=dims.tp_size,
    )
    model = GPTModel(
        config=transformer,
        transformer_layer_spec=_layer_spec(transformer, layer_spec(config, dims.device.type), dims, vp_stage),
        vocab_size=vocabulary,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=geometry.tied,
        **family.gpt_arguments(hf_config),
        vp_stage=vp_stage,
        pg_collection=dims.pg_collection,
    )
    if weight_gradient_fusion(config, dims.device.type) == "layers":
        for module in model.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):  # a linear of Transformer Engine
                module.fuse_wgrad_accumulation = True
    return model


def _layer_spec(
    config: TransformerConfig, kind: str, dims: ParallelDims, vp_stage: int | None
) -> ModuleSpec | TransformerBlockSubmodules:
    """The layers that the family's fields ask for; the local spec gets our attention and RMSNorm."""
    layer_kind = {
        "num_experts": config.num_moe_experts,
        "moe_grouped_gemm": config.moe_grouped_gemm,
        "qk_layernorm": config.qk_layernorm,
    }
    if kind == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec(**layer_kind)
    if config.normalization != "RMSNorm":
        raise ConfigError(
            f"the local layer spec has no normalization {config.normalization!r} here: "
            "use layer_spec=transformer_engine"
        )
    spec = get_gpt_layer_local_spec(**layer_kind, normalization=config.normalization)
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = SDPAttention
    if config.qk_layernorm:
        attention.q_layernorm = RMSNorm
        attention.k_layernorm = RMSNorm
    layers = get_num_layers_to_build(config, vp_stage, dims.pp_rank)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=RMSNorm)


def _refuse_fields(transformer: dict[str, Any]) -> None:
    """Refuses the fields of ``model.transformer`` that do not exist or must not be set there."""
    known = [field.name for field in dataclasses.fields(TransformerConfig)]
    for name, value in transformer.items():
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else "see megatron.core.transformer.TransformerConfig"
            raise ConfigError(f"model.transformer.{name} is not a field of Megatron's TransformerConfig: {hint}")
        if name in OWNED:
            raise ConfigError(f"model.transformer.{name}={value!r} must not be set there: set {OWNED[name]}")
        if name in FIXED:
            raise ConfigError(f"model.transformer.{name}={value!r} must not be set: {FIXED[name]}")
