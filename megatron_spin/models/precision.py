"""Compute dtype and FP8 of a model: the fields of Megatron's TransformerConfig, and the wrapper that casts its inputs."""

from typing import Any

import torch
from megatron.core.transformer.module import Float16Module, MegatronModule

from megatron_spin.config import Config
from megatron_spin.errors import ConfigError
from megatron_spin.hf.files import DTYPES


def precision_fields(config: Config) -> dict[str, Any]:
    """The ``TransformerConfig`` fields that ``precision`` stands for; parallel/fp8.py checked before whether FP8 exists here."""
    dtype = DTYPES[config.precision.dtype]
    return {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": config.precision.dtype == "bf16",
        "fp8": config.precision.fp8,
    }


def allowed_dtypes(config: Config) -> set[torch.dtype]:
    """What a provider's parameters may be: Float16Module casts fp32 to bf16, nothing casts the other way."""
    return {torch.float32, DTYPES[config.precision.dtype]}


def in_precision(model: MegatronModule, config: Config) -> MegatronModule:
    """``model`` itself in fp32; in bf16 wrapped so that its floating point inputs are cast down and the last stage's outputs up.

    Raises:
        ConfigError: a provider's own configuration contradicts ``precision.dtype``.
    """
    wanted = {"bf16": config.precision.dtype == "bf16", "fp16": False, "fp8": config.precision.fp8}
    for name, value in wanted.items():
        if (getattr(model.config, name, None) or None) != (value or None):
            raise ConfigError(
                f"the model's TransformerConfig has {name}={getattr(model.config, name, None)!r}, but precision asks for {value!r}: "
                "make model.provider and precision agree"
            )
    return Float16Module(model.config, model) if wanted["bf16"] else model
