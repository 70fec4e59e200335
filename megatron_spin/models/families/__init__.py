"""The registry of model families: every module of this package describes one, as ``FAMILY``.

To add a family, add a module; nothing else has to name it.
"""

import functools
import importlib
import pkgutil

from megatron_spin.errors import CheckpointError
from megatron_spin.models.family import Family, HfConfig


@functools.cache
def families() -> dict[str, Family]:
    """Every family by each of its ``model_type`` values, in alphabetical order of the modules."""
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(__path__):
        family: Family = importlib.import_module(f"{__name__}.{module.name}").FAMILY
        for model_type in family.model_types:
            found[model_type] = family
    return found


def family_of(hf_config: HfConfig) -> Family:
    """The family of a ``config.json``.

    Raises:
        CheckpointError: no family has its ``model_type``, or its weights are quantized.
    """
    model_type = hf_config.get("model_type")
    if model_type not in families():
        raise CheckpointError(
            f"model_type {model_type!r} in config.json is none of {', '.join(families())}: use one of these families"
        )
    if "quantization_config" in hf_config:
        raise CheckpointError("quantization_config in config.json: quantized models are not supported, use a full one")
    return families()[model_type]
