"""The device, and Megatron-Core's adapter to the CPU."""

from pathlib import Path

import pytest
import torch

from megatron_spin.errors import DeviceError
from megatron_spin.parallel.check import refuse_untested
from megatron_spin.parallel.setup import choose_device
from tests.support.processes import run_python


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_is_refused_where_there_is_none() -> None:
    with pytest.raises(DeviceError, match="device=cuda, but PyTorch sees no GPU"):
        choose_device("cuda")


@pytest.mark.parametrize("version", ["0.16.1", "0.17.1", "0.18.2", "0.19.2"])
def test_tested_versions_of_megatron(version: str) -> None:
    refuse_untested(version)


@pytest.mark.parametrize("version", ["0.15.0", "0.16.0", "0.20.0rc0", "0.20.0", "1.0"])
def test_untested_versions_of_megatron_are_refused(version: str) -> None:
    with pytest.raises(DeviceError, match=rf"megatron-core {version} is outside the tested range >=0.16.1,<0.20"):
        refuse_untested(version)


def test_the_adapter_refuses_to_come_after_megatron() -> None:
    result = run_python(
        "import megatron.core\n"
        "from megatron_spin.errors import DeviceError\n"
        "from megatron_spin.parallel.setup import choose_device\n"
        "try: choose_device('cpu')\n"
        "except DeviceError as error: print(error)\n"
    )
    assert "megatron.core was imported before the CPU adapter" in result.stdout, result.stderr


def test_kernels_for_gpus_are_not_used_on_a_cpu(tmp_path: Path) -> None:
    """An apex (right or wrong) that can be imported would make Megatron choose its norms and optimizers."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    result = run_python(
        "from megatron_spin.parallel.setup import choose_device\n"
        "print(choose_device('cpu'), choose_device('auto'))\n"
        "from megatron.core.models.gpt import gpt_layer_specs\n"
        "print(gpt_layer_specs.HAVE_APEX, gpt_layer_specs.HAVE_TE)\n",
        tmp_path,
    )
    assert result.stdout.splitlines()[-2:] == ["cpu cpu", "False False"], result.stderr
