"""Compute dtype and FP8 of a model: fields of Megatron's TransformerConfig, and the wrapper that casts its inputs."""

import dataclasses
from typing import Any

import torch
from megatron.core.transformer.module import Float16Module, MegatronModule

from megatron_spin.config import Config
from megatron_spin.errors import ConfigError
from megatron_spin.hf.files import DTYPES

MEGATRON_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.uint8,
}
"""Megatron-LM's names of dtypes; Transformer Engine's FP8 is stored as bytes."""


def with_dtypes(kind: type[Any], values: dict[str, Any], section: str) -> dict[str, Any]:
    """``values`` with dtypes in place of their names, in every field of ``kind`` whose type is a torch.dtype.

    Raises:
        ConfigError: a name is none of :data:`MEGATRON_DTYPES`, and no ``torch.NAME`` of a dtype either.
    """
    converted = dict(values)
    for field in dataclasses.fields(kind):
        value = values.get(field.name)
        if "torch.dtype" not in str(field.type) or not isinstance(value, str):
            continue
        dtype = MEGATRON_DTYPES.get(value) or getattr(torch, value.removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise ConfigError(
                f"{section}.{field.name}={value!r} is no dtype: use one of {', '.join(MEGATRON_DTYPES)}, or torch.NAME"
            )
        converted[field.name] = dtype
    return converted


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
