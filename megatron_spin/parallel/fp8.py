"""Where FP8 can run: by GPU, CUDA and Transformer Engine. A run cannot ask for it yet (``config/rules.py``)."""

import dataclasses

from packaging.version import Version


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
