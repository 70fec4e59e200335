"""Where FP8 can run: by GPU, CUDA and Transformer Engine."""

import dataclasses

from packaging.version import Version

from megatron_spin.config import Config
from megatron_spin.errors import DeviceError
from megatron_spin.machine import version_of
from megatron_spin.parallel.kernels import layer_spec


@dataclasses.dataclass(frozen=True)
class FP8Rule:
    """One way in which a recipe can run."""

    recipe: str
    """Megatron's ``fp8_recipe``."""
    from_capability: tuple[int, int]
    """CUDA compute capabilities from this one ..."""
    below_capability: tuple[int, int]
    """... to below this one."""
    from_cuda: tuple[int, int]
    from_transformer_engine: tuple[int, int]


FP8_RULES = (
    FP8Rule("delayed", (8, 9), (9, 0), from_cuda=(12, 1), from_transformer_engine=(1, 0)),
    FP8Rule("delayed", (9, 0), (99, 0), from_cuda=(11, 8), from_transformer_engine=(1, 0)),
    FP8Rule("tensorwise", (8, 9), (9, 0), from_cuda=(12, 1), from_transformer_engine=(2, 2)),
    FP8Rule("tensorwise", (9, 0), (99, 0), from_cuda=(11, 8), from_transformer_engine=(2, 2)),
    FP8Rule("blockwise", (9, 0), (99, 0), from_cuda=(12, 9), from_transformer_engine=(2, 3)),
    FP8Rule("mxfp8", (10, 0), (12, 0), from_cuda=(12, 8), from_transformer_engine=(2, 1)),
)
"""What Transformer Engine's own checks accept, as Megatron calls it."""


def fp8_recipes(
    *, capability: tuple[int, int] | None, cuda: str | None, transformer_engine: str | None
) -> tuple[str, ...]:
    """Megatron's ``fp8_recipe`` values that can run: none on a CPU, without Transformer Engine or on an A100 (8.0).

    Args:
        capability: CUDA compute capability, None on a CPU.
        cuda: version of CUDA that torch was built with, None for a CPU build.
        transformer_engine: its version, None where it is not installed.
    """
    if capability is None or cuda is None or transformer_engine is None:
        return ()
    toolkit, engine = Version(cuda).release, Version(transformer_engine).release
    recipes = []
    for rule in FP8_RULES:
        on_this_gpu = rule.from_capability <= capability < rule.below_capability
        if on_this_gpu and toolkit >= rule.from_cuda and engine >= rule.from_transformer_engine:
            recipes.append(rule.recipe)
    return tuple(recipes)


def check_fp8(config: Config, device_type: str) -> None:
    """Refuses an FP8 format that cannot run here; Megatron itself would silently ignore it.

    Raises:
        DeviceError: the GPU, CUDA, Transformer Engine or the layer spec does not allow it.
    """
    fp8, engine = config.precision.fp8, version_of("transformer-engine")
    if fp8 is None:
        return
    import torch  # here, not above: it takes seconds, and most runs need no FP8

    capability = torch.cuda.get_device_capability() if device_type == "cuda" else None
    recipe = config.model.transformer.get("fp8_recipe", "delayed")
    possible = fp8_recipes(capability=capability, cuda=torch.version.cuda, transformer_engine=engine)
    if recipe not in possible:
        place = f"compute capability {capability[0]}.{capability[1]}" if capability else "a CPU"
        raise DeviceError(
            f"precision.fp8={fp8} with fp8_recipe={recipe} cannot run on {place} with CUDA "
            f"{torch.version.cuda or 'absent'} and Transformer Engine {engine or 'absent'}; recipes that can: "
            f"{', '.join(possible) or 'none'}: set precision.fp8 to null"
        )
    if layer_spec(config, device_type) != "transformer_engine":
        raise DeviceError(
            f"precision.fp8={fp8} needs Transformer Engine's layers: set layer_spec: transformer_engine, "
            "or precision.fp8 to null"
        )
