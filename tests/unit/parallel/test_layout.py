"""What is refused before a process group exists: layouts, FP8, devices, versions, foreign packages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_spin.config import Config, from_dict
from megatron_spin.errors import ConfigError, DeviceError
from megatron_spin.parallel import cpu_device, fp8, kernels
from megatron_spin.parallel.fp8 import check_fp8, fp8_recipes
from megatron_spin.parallel.kernels import check_layer_spec, refuse_wrong_apex
from megatron_spin.parallel.layout import check_layout, layout_errors
from megatron_spin.parallel.setup import choose_device

HF = {
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "hidden_size": 64,
}
CPU = torch.device("cpu")


def config(*, parallel: dict | None = None, training: dict | None = None, **sections) -> Config:
    batch = {"global_batch_size": 16, "micro_batch_size": 2, **(training or {})}
    return from_dict(
        {
            "name": "x",
            "model": {"hf": "x"},
            "data": {"path": "x"},
            "parallel": parallel or {},
            "training": batch,
            **sections,
        }
    )


def layout(tp: int = 1, pp: int = 1, *, world_size: int, training: dict | None = None, **changes) -> list[str]:
    parallel = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    return layout_errors(config(parallel=parallel, training=training), {**HF, **changes}, world_size=world_size)


@pytest.mark.parametrize(
    ("tp", "pp", "world_size"),
    [(1, 1, 1), (2, 1, 2), (4, 1, 4), (8, 1, 8), (2, 2, 4), (1, 4, 8), (2, 2, 16), (1, 1, 8)],
)
def test_layouts_that_fit(tp, pp, world_size):
    """TP 4 and 8 exceed the 2 key/value heads: Megatron shares them between ranks."""
    assert layout(tp, pp, world_size=world_size) == []


@pytest.mark.parametrize(
    ("errors", "factors"),
    [
        (
            layout(3, world_size=3, num_key_value_heads=3, training={"global_batch_size": 2}),
            ["tensor_model_parallel_size=3", "heads=8"],
        ),
        (layout(8, world_size=8, intermediate_size=100), ["tensor_model_parallel_size=8", "intermediate_size=100"]),
        (layout(2, world_size=2, num_key_value_heads=5), ["tensor_model_parallel_size=2", "num_key_value_heads=5"]),
        (
            layout(pp=3, world_size=3, training={"global_batch_size": 2}),
            ["pipeline_model_parallel_size=3", "num_hidden_layers=4"],
        ),
        (layout(2, 2, world_size=6), ["6 processes", "the 4 of one replica", "tensor 2 x pipeline 2 x context 1"]),
        (
            layout(2, world_size=6),
            [
                "global_batch_size=16",
                "micro_batch_size=2",
                "3 data parallel ranks",
                "6 processes / tensor 2 / pipeline 1 / context 1",
            ],
        ),
    ],
)
def test_each_error_names_every_factor(errors, factors):
    assert len(errors) == 1
    assert all(factor in errors[0] for factor in factors), errors[0]


def test_all_errors_are_listed_and_raised_in_one_line():
    errors = layout(3, 3, world_size=10, intermediate_size=100)
    assert len(errors) == 5
    parallel = {"tensor_model_parallel_size": 3, "pipeline_model_parallel_size": 3}
    with pytest.raises(ConfigError) as caught:
        check_layout(config(parallel=parallel), {**HF, "intermediate_size": 100}, world_size=10)
    assert all(error in str(caught.value) for error in errors) and "\n" not in str(caught.value)


def test_heads_without_groups_and_incomplete_config():
    assert layout_errors(config(), {**HF, "num_key_value_heads": None}, world_size=1) == []
    [error] = layout_errors(config(), {"num_attention_heads": 4, "num_hidden_layers": 2}, world_size=1)
    assert "lacks intermediate_size" in error


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
def test_fp8_table(capability, cuda, engine, recipes):
    assert fp8_recipes(capability=capability, cuda=cuda, transformer_engine=engine) == recipes


def test_fp8_and_transformer_engine_are_refused_on_a_cpu():
    with pytest.raises(
        DeviceError,
        match=r"precision.fp8=hybrid .* cannot run on a CPU .* recipes that can: none: set precision.fp8 to null",
    ):
        check_fp8(config(precision={"fp8": "hybrid"}), CPU)
    with pytest.raises(ConfigError, match=r"precision.fp8: 'e5m2' is not one of e4m3, hybrid"):
        config(precision={"fp8": "e5m2"})
    with pytest.raises(DeviceError, match="layer_spec=transformer_engine needs a GPU"):
        check_layer_spec(config(layer_spec="transformer_engine"), CPU)
    check_layer_spec(config(), CPU)
    check_fp8(config(), CPU)


def test_fp8_with_the_local_spec_is_refused_on_a_gpu_that_has_it(monkeypatch):
    """Megatron's local linears are never FP8, and say nothing."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    for module in (fp8, kernels):
        monkeypatch.setattr(module, "version_of", lambda package: "2.8.0")
    gpu = torch.device("cuda", 0)
    check_fp8(config(precision={"fp8": "hybrid"}), gpu)
    with pytest.raises(DeviceError, match="needs Transformer Engine's layers"):
        check_fp8(config(precision={"fp8": "hybrid"}, layer_spec="local"), gpu)
    with pytest.raises(
        DeviceError, match=r"fp8_recipe=mxfp8 cannot run on compute capability 9.0 .* delayed, tensorwise"
    ):
        check_fp8(config(precision={"fp8": "hybrid"}, model={"hf": "x", "transformer": {"fp8_recipe": "mxfp8"}}), gpu)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_is_refused_where_there_is_none():
    with pytest.raises(DeviceError, match="device=cuda, but PyTorch sees no GPU"):
        choose_device("cuda")


@pytest.mark.parametrize("version", ["0.16.1", "0.17.1", "0.18.2", "0.19.2"])
def test_tested_versions_of_megatron(version):
    cpu_device.refuse_untested(version)


@pytest.mark.parametrize("version", ["0.15.0", "0.16.0", "0.20.0rc0", "0.20.0", "1.0"])
def test_untested_versions_of_megatron_are_refused(version):
    with pytest.raises(DeviceError, match=rf"megatron-core {version} is outside the tested range >=0.16.1,<0.20"):
        cpu_device.refuse_untested(version)


@pytest.mark.parametrize(
    ("module", "refused"), [("apex/__init__.py", True), ("apex.py", True), ("apex/normalization/__init__.py", False)]
)
def test_another_apex_is_named(tmp_path: Path, monkeypatch, module, refused):
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


def run(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=root,
        env=_environment(root, *path),
        timeout=300,
    )


def _environment(*path: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}


def test_the_adapter_refuses_to_come_after_megatron():
    result = run(
        "import megatron.core\n"
        "from megatron_spin.errors import DeviceError\n"
        "from megatron_spin.parallel.setup import choose_device\n"
        "try: choose_device('cpu')\n"
        "except DeviceError as error: print(error)\n"
    )
    assert "megatron.core was imported before the CPU adapter" in result.stdout, result.stderr


def test_kernels_for_gpus_are_not_used_on_a_cpu(tmp_path: Path):
    """An apex (right or wrong) that can be imported would make Megatron choose its norms and optimizers."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    result = run(
        "from megatron_spin.parallel.setup import choose_device\n"
        "print(choose_device('cpu'), choose_device('auto'))\n"
        "from megatron.core.models.gpt import gpt_layer_specs\n"
        "print(gpt_layer_specs.HAVE_APEX, gpt_layer_specs.HAVE_TE)\n",
        tmp_path,
    )
    assert result.stdout.splitlines()[-2:] == ["cpu cpu", "False False"], result.stderr
