"""Layer specs, TF32, and foreign or broken packages that are refused."""

import sys
from pathlib import Path

import pytest
import torch

from megatron_spin.errors import DeviceError
from megatron_spin.parallel import kernels
from megatron_spin.parallel.kernels import check_layer_spec, layer_spec, refuse_wrong_apex, weight_gradient_fusion
from megatron_spin.parallel.setup import compute_in_fp32
from tests.support.configs import build
from tests.support.processes import run_python


def test_transformer_engine_is_refused_on_a_cpu() -> None:
    with pytest.raises(DeviceError, match="layer_spec=transformer_engine needs a GPU"):
        check_layer_spec(build(layer_spec="transformer_engine"), "cpu")
    check_layer_spec(build(), "cpu")


def test_transformer_engine_is_refused_in_fp32() -> None:
    with pytest.raises(DeviceError, match=r"transformer_engine does not compute in precision.dtype=fp32.*TF32.*local"):
        check_layer_spec(build(layer_spec="transformer_engine", precision={"dtype": "fp32"}), "cuda")


@pytest.mark.parametrize(
    ("asked", "dtype", "device", "installed", "spec"),
    [
        ("auto", "bf16", "cuda", True, "transformer_engine"),
        ("auto", "fp32", "cuda", True, "local"),
        ("auto", "bf16", "cuda", False, "local"),
        ("auto", "bf16", "cpu", True, "local"),
        ("local", "bf16", "cuda", True, "local"),
    ],
)
def test_what_auto_stands_for(
    monkeypatch: pytest.MonkeyPatch, asked: str, dtype: str, device: str, installed: bool, spec: str
) -> None:
    monkeypatch.setattr(kernels, "has_transformer_engine", lambda: installed)
    assert layer_spec(build(layer_spec=asked, precision={"dtype": dtype}), device) == spec


@pytest.mark.parametrize(
    ("device", "spec", "apex", "asked", "fusion"),
    [
        ("cuda", "transformer_engine", False, True, "layers"),
        ("cuda", "transformer_engine", True, True, "all"),
        ("cuda", "local", True, True, "all"),
        ("cuda", "local", False, True, "none"),
        ("cuda", "transformer_engine", True, False, "none"),
        ("cpu", "local", True, True, "none"),
    ],
)
def test_where_weight_gradients_are_fused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, spec: str, apex: bool, asked: bool, fusion: str
) -> None:
    if apex:
        (tmp_path / "fused_weight_gradient_mlp_cuda.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    transformer = {} if asked else {"gradient_accumulation_fusion": False}
    config = build(layer_spec=spec, model={"hf": "x", "transformer": transformer})
    assert weight_gradient_fusion(config, device) == fusion


def test_fp32_is_not_tf32() -> None:
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    compute_in_fp32()
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32


def test_deterministic_kernels() -> None:
    """In a process of its own, since it stays set."""
    result = run_python(
        "import os, torch\n"
        "os.environ['NCCL_ALGO'] = 'Tree'\n"
        "from megatron_spin.parallel.setup import DETERMINISTIC, compute_deterministically\n"
        "compute_deterministically()\n"
        "print({name: os.environ[name] for name in DETERMINISTIC}, torch.are_deterministic_algorithms_enabled())\n"
    )
    environment = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}
    assert result.stdout.strip() == f"{environment} True", result.stderr


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise ImportError('undefined symbol: c10')", "ImportError: undefined symbol: c10"),
        ("raise OSError('libcudnn.so.9: cannot open')", "OSError: libcudnn.so.9: cannot open"),
        ("", "ModuleNotFoundError: No module named 'transformer_engine.pytorch.tensor'"),
    ],
)
def test_a_broken_transformer_engine_is_named(tmp_path: Path, source: str, reason: str) -> None:
    """As left by a build for another torch: the distribution is there, the import fails."""
    package = tmp_path / "transformer_engine" / "pytorch"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("__version__ = '2.10.0'")
    (package / "__init__.py").write_text(source)
    metadata = tmp_path / "transformer_engine-2.10.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: transformer-engine\nVersion: 2.10.0\n")
    result = run_python(
        "from megatron_spin.errors import DeviceError\n"
        "from megatron_spin.parallel.kernels import check_layer_spec\n"
        "from tests.support.configs import build\n"
        "check_layer_spec(build(), 'cpu')\n"
        "try: check_layer_spec(build(), 'cuda')\n"
        "except DeviceError as error: print(error)\n",
        tmp_path,
    )
    assert f"Transformer Engine 2.10.0 is installed, but does not work ({reason})" in result.stdout, result.stderr
    assert "or uninstall it" in result.stdout


@pytest.mark.parametrize(
    ("module", "refused"), [("apex/__init__.py", True), ("apex.py", True), ("apex/normalization/__init__.py", False)]
)
def test_another_apex_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, refused: bool) -> None:
    path = tmp_path / module
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    (tmp_path / "apex" / "__init__.py").touch() if path.parent != tmp_path else None
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    if refused:
        with pytest.raises(DeviceError, match=r"is not NVIDIA's .*pip uninstall apex"):
            refuse_wrong_apex()
    else:
        refuse_wrong_apex()
