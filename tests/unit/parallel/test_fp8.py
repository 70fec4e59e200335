"""Where FP8 can run."""

import pytest

from megatron_spin.errors import ConfigError
from megatron_spin.parallel.fp8 import fp8_recipes
from tests.support.configs import build

PER_TENSOR = ("delayed", "tensorwise")


@pytest.mark.parametrize(
    ("capability", "cuda", "engine", "recipes"),
    [
        (None, None, None, ()),  # CPU
        ((9, 0), "12.8", None, ()),  # no Transformer Engine
        ((9, 0), None, "2.8.0", ()),  # a CPU build of torch
        ((8, 0), "12.8", "2.8.0", ()),  # A100
        ((8, 9), "12.8", "2.8.0", PER_TENSOR),  # L40S
        ((8, 9), "11.8", "2.8.0", ()),  # Ada needs CUDA 12.1
        ((9, 0), "12.8", "2.8.0", PER_TENSOR),  # H100
        ((9, 0), "12.9", "2.8.0", (*PER_TENSOR, "blockwise")),
        ((9, 0), "12.9", "2.2.0", PER_TENSOR),
        ((9, 0), "12.9", "2.3.0.dev0+5fdd7bb", (*PER_TENSOR, "blockwise")),
        ((9, 0), "12.9", "1.13.0", ("delayed",)),
        ((10, 0), "12.8", "2.8.0", (*PER_TENSOR, "mxfp8")),  # B200
        ((10, 0), "13.0", "2.8.0", (*PER_TENSOR, "blockwise", "mxfp8")),
        ((12, 0), "13.0", "2.8.0", (*PER_TENSOR, "blockwise")),  # RTX 5090: no MXFP8 for every matrix product
    ],
)
def test_fp8_table(
    capability: tuple[int, int] | None, cuda: str | None, engine: str | None, recipes: tuple[str, ...]
) -> None:
    assert fp8_recipes(capability=capability, cuda=cuda, transformer_engine=engine) == recipes


@pytest.mark.parametrize("fp8", ["e4m3", "hybrid"])
def test_fp8_is_refused_by_name(fp8: str) -> None:
    with pytest.raises(ConfigError, match=f"precision.fp8={fp8} is not supported yet.*set precision.fp8 to null"):
        build(precision={"fp8": fp8})
    assert build(precision={"fp8": None}).precision.fp8 is None


def test_other_formats_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"precision.fp8: 'e5m2' is not one of e4m3, hybrid"):
        build(precision={"fp8": "e5m2"})
