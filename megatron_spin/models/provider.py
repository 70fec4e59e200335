"""Models are built here and nowhere else: by our provider from a Hugging Face config, or by the user's, with Megatron's signature."""

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
from megatron_spin.hf.files import read_hf_config
from megatron_spin.models.gpt import gpt_model
from megatron_spin.models.precision import allowed_dtypes, in_precision
from megatron_spin.models.vocabulary import mask_padding
from megatron_spin.parallel.cpu_device import megatron_region
from megatron_spin.parallel.dims import ParallelDims

ModelProvider = Callable[..., MegatronModule]
"""``(pre_process, post_process, vp_stage) -> model``: Megatron-LM's ``model_provider``, Megatron-Bridge's ``GPTModelProvider.provide``."""


def model_provider(config: Config, dims: ParallelDims) -> ModelProvider:
    """The provider that ``model.provider`` names, or ours.

    Raises:
        ConfigError: the name is not ``package.module:function``, cannot be imported or is no function.
    """
    name = config.model.provider
    if name is None:
        hf_config = read_hf_config(Path(config.model.hf))

        def ours(pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None) -> MegatronModule:
            return gpt_model(
                hf_config, config, dims, pre_process=pre_process, post_process=post_process, vp_stage=vp_stage
            )

        return ours
    provider: ModelProvider = load_named(name, key="model.provider", kind="function")
    if not callable(provider):
        raise ConfigError(
            f"model.provider={name!r} is not a function: it is called with (pre_process, post_process, vp_stage)"
        )
    return provider


def build_model(config: Config, dims: ParallelDims) -> list[MegatronModule]:
    """This rank's model chunks on its device, weights uninitialized (ours) or as the provider made them.

    The padding of the vocabulary never counts in the loss; bf16 models are wrapped in Megatron's Float16Module.

    Raises:
        ConfigError: the provider cannot be found, or its model has dropout or another dtype than ``precision.dtype``.
    """
    provider = model_provider(config, dims)
    vocab_size = read_hf_config(Path(config.model.hf))["vocab_size"]
    with megatron_region():
        model = provider(pre_process=dims.is_first_stage, post_process=dims.is_last_stage, vp_stage=None)
        _check_provided(model, config)
        model.to(dims.device)
        _mark_tensor_parallel(model)
        mask_padding(model, vocab_size)
        # Gradients are divided by the pairs (or tokens) of the global batch; DDP asks when it is built.
        model.config.calculate_per_token_loss = True
        # Microbatches differ in length, so pipeline stages tell each other the shapes that they send.
        model.config.variable_seq_lengths = dims.pp_size > 1
        return [in_precision(model, config)]


def _check_provided(model: MegatronModule, config: Config) -> None:
    """What a user's provider easily forgets, since Megatron's defaults are others, and what would go wrong without a word."""
    where = f"model.provider={config.model.provider!r}"
    for name in ("hidden_dropout", "attention_dropout"):
        value = getattr(model.config, name, 0.0)
        if value:
            raise ConfigError(
                f"{where} sets {name}={value}: it must be 0, since scoring and training must be one function (Megatron has 0.1)"
            )
    if config.parallel.pipeline_model_parallel_size > 1 and getattr(model.config, "num_moe_experts", None):
        dispatcher = model.config.moe_token_dispatcher_type
        if dispatcher == "allgather":
            raise ConfigError(
                f"{where} sets moe_token_dispatcher_type={dispatcher}: pipeline stages exchange microbatches of different "
                "lengths, which needs alltoall"
            )
    wrong = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()} - allowed_dtypes(
        config
    )
    if wrong:
        raise ConfigError(
            f"{where} made {wrong.pop()} parameters, but precision.dtype={config.precision.dtype}: make them agree"
        )


def _mark_tensor_parallel(model: MegatronModule) -> None:
    """Megatron marks sharded weights only while it initializes them; of unmarked ones the gradient norm sees the first rank's alone."""
    for module in model.modules():
        sharded = isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding)
        weight = getattr(module, "weight", None)
        if sharded and weight is not None and not hasattr(weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(weight, True, int(isinstance(module, RowParallelLinear)), 1)
    for parameter in model.parameters():
        set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
