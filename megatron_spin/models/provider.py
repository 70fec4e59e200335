"""The one place where models are built: by the provider from a Hugging Face config, or by the user's own."""

import functools
from collections.abc import Callable
from pathlib import Path

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import (
    set_defaults_if_not_set_tensor_model_parallel_attributes,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule

from megatron_spin.config import Config
from megatron_spin.config.named import load_named
from megatron_spin.errors import ConfigError
from megatron_spin.hf.assets import read_hf_config
from megatron_spin.models.gpt import gpt_model
from megatron_spin.models.precision import allowed_dtypes, in_precision
from megatron_spin.models.vocabulary import mask_padding
from megatron_spin.parallel.cpu_device import megatron_region
from megatron_spin.parallel.dims import ParallelDims

ModelProvider = Callable[..., MegatronModule]
"""``(pre_process, post_process, vp_stage) -> model``, the signature of Megatron-LM's ``model_provider`` and of
Megatron-Bridge's ``GPTModelProvider.provide``."""


def model_provider(config: Config, dims: ParallelDims) -> ModelProvider:
    """The provider that ``model.provider`` names; by default :func:`megatron_spin.models.gpt.gpt_model`.

    Raises:
        ConfigError: the name is not ``package.module:function``, cannot be imported or is no function.
    """
    name = config.model.provider
    if name is None:
        return functools.partial(gpt_model, read_hf_config(Path(config.model.hf)), config, dims)
    provider: ModelProvider = load_named(name, key="model.provider", kind="function")
    if not callable(provider):
        raise ConfigError(
            f"model.provider={name!r} is not a function: it is called with (pre_process, post_process, vp_stage)"
        )
    return provider


def build_model(config: Config, dims: ParallelDims) -> list[MegatronModule]:
    """This rank's model chunks on its device; the weights are uninitialized, or as the user's provider made them.

    The padding of the vocabulary does not count in the loss. bf16 models are wrapped in Megatron's Float16Module.

    Raises:
        CheckpointError: ``model.hf`` has no readable config.json, or one of no known family.
        ConfigError: the provider cannot be found, or its model has dropout or another dtype than ``precision.dtype``.
    """
    provider = model_provider(config, dims)
    vocab_size = read_hf_config(Path(config.model.hf))["vocab_size"]
    with megatron_region():
        model = provider(pre_process=dims.is_first_stage, post_process=dims.is_last_stage, vp_stage=None)
        _check_provided(model, config)
        model.to(dims.device)
        _mark_tensor_parallel(model)
        mask_padding(model, vocab_size, dims.pg_collection.tp)
        # Gradients are divided by the pairs (or tokens) of the global batch; DDP asks when it is built.
        model.config.calculate_per_token_loss = True
        # Microbatches differ in length, so pipeline stages tell each other the shapes that they send.
        model.config.variable_seq_lengths = dims.pp_size > 1
        return [in_precision(model, config)]


def _check_provided(model: MegatronModule, config: Config) -> None:
    """Refuses what a user's provider easily forgets, since Megatron's defaults differ, and what would fail silently."""
    where = f"model.provider={config.model.provider!r}" if config.model.provider else "the model"
    for name in ("hidden_dropout", "attention_dropout"):
        value = getattr(model.config, name, 0.0)
        if value:
            raise ConfigError(
                f"{where} sets {name}={value}: it must be 0, since scoring and training must be one function "
                "(Megatron's default is 0.1)"
            )
    if config.parallel.pipeline_model_parallel_size > 1 and getattr(model.config, "num_moe_experts", None):
        dispatcher = model.config.moe_token_dispatcher_type
        if dispatcher == "allgather":
            raise ConfigError(
                f"{where} sets moe_token_dispatcher_type={dispatcher}: pipeline stages exchange microbatches of "
                "different lengths, which needs alltoall"
            )
    allowed = allowed_dtypes(config)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype not in allowed:
            raise ConfigError(
                f"{where} made {parameter.dtype} parameters, but precision.dtype={config.precision.dtype}: "
                "make them agree"
            )


def _mark_tensor_parallel(model: MegatronModule) -> None:
    """Marks sharded weights as Megatron does when it initializes them, which is left out here.

    The gradient norm counts an unmarked weight on the first tensor parallel rank only.
    """
    for module in model.modules():
        sharded = isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding)
        weight = getattr(module, "weight", None)
        if sharded and weight is not None and not hasattr(weight, "tensor_model_parallel"):
            dimension = 1 if isinstance(module, RowParallelLinear) else 0
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dimension, stride=1)
    for parameter in model.parameters():
        set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
