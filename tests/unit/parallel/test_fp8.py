"""Where FP8 can run."""

import pytest
import torch

from megatron_spin.errors import ConfigError, DeviceError
from megatron_spin.parallel import fp8, kernels
from megatron_spin.parallel.fp8 import check_fp8, fp8_recipes
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


def test_fp8_is_refused_on_a_cpu() -> None:
    with pytest.raises(
        DeviceError,
        match=r"precision.fp8=hybrid .* cannot run on a CPU .* recipes that can: none: set precision.fp8 to null",
    ):
        check_fp8(build(precision={"fp8": "hybrid"}), "cpu")
    check_fp8(build(), "cpu")


def test_other_formats_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"precision.fp8: 'e5m2' is not one of e4m3, hybrid"):
        build(precision={"fp8": "e5m2"})


def test_fp8_with_the_local_spec_is_refused_on_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's local linears are never FP8, and say nothing."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    for module in (fp8, kernels):
        monkeypatch.setattr(module, "version_of", lambda package: "2.8.0")
    check_fp8(build(precision={"fp8": "hybrid"}), "cuda")
    with pytest.raises(DeviceError, match="needs Transformer Engine's layers"):
        check_fp8(build(precision={"fp8": "hybrid"}, layer_spec="local"), "cuda")
    with pytest.raises(
        DeviceError, match=r"fp8_recipe=mxfp8 cannot run on compute capability 9.0 .* delayed, tensorwise"
    ):
        check_fp8(build(precision={"fp8": "hybrid"}, model={"hf": "x", "transformer": {"fp8_recipe": "mxfp8"}}), "cuda")
