"""Compute dtype and FP8 of a model: fields of Megatron's TransformerConfig, and the wrapper that casts its inputs."""

from typing import Any

import torch
from megatron.core.transformer.module import Float16Module, MegatronModule

from megatron_spin.config import Config
from megatron_spin.errors import ConfigError
from megatron_spin.hf.files import DTYPES


def precision_fields(config: Config) -> dict[str, Any]:
    """The fields of TransformerConfig that the section ``precision`` stands for."""
    dtype = DTYPES[config.precision.dtype]
    return {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": config.precision.dtype == "bf16",
        "fp8": config.precision.fp8,
    }


def allowed_dtypes(config: Config) -> set[torch.dtype]:
    """Dtypes that a provider's parameters may have: Float16Module casts fp32 to bf16, nothing casts bf16 to fp32."""
    return {torch.float32, DTYPES[config.precision.dtype]}


def in_precision(model: MegatronModule, config: Config) -> MegatronModule:
    """``model`` itself in fp32; in bf16 wrapped, so that its inputs are cast to bf16 and the last stage's outputs to
    fp32.

    Raises:
        ConfigError: a provider's own TransformerConfig contradicts the section ``precision``.
    """
    wanted = {"bf16": config.precision.dtype == "bf16", "fp16": False, "fp8": config.precision.fp8}
    for name, value in wanted.items():
        found = getattr(model.config, name, None)
        # False and None both mean that it is off.
        if (found or None) != (value or None):
            raise ConfigError(
                f"the model's TransformerConfig has {name}={found!r}, but precision asks for {value!r}: "
                "make model.provider and precision agree"
            )
    return Float16Module(model.config, model) if wanted["bf16"] else model
