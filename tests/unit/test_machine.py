"""The GPUs that a machine is seen to have, from device files alone."""

from pathlib import Path

import pytest

from megatron_spin.machine import visible_gpus

NO_TOOLS = {"PATH": ""}
"""An environment without nvidia-smi, as in many containers."""


def machine(root: Path, *, gpus: int) -> Path:
    """A root directory with the device files of ``gpus`` GPUs and those that come with any driver."""
    (root / "dev").mkdir()
    names = [f"nvidia{i}" for i in range(gpus)]
    for name in [*names, "nvidiactl", "nvidia-uvm", "null"]:
        (root / "dev" / name).touch()
    return root


def test_gpus_are_counted_without_nvidia_smi(tmp_path: Path) -> None:
    found = visible_gpus(NO_TOOLS, machine(tmp_path, gpus=8))
    assert found.names == tuple("01234567")
    assert str(found) == "8 GPUs (device files /dev/nvidia*)"


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("", ()),
        ("-1", ()),
        ("2,0", ("2", "0")),
        ("1, 3", ("1", "3")),
        ("0,4,1", ("0",)),  # CUDA ignores what follows an entry that is not there
        ("GPU-8932f937,MIG-7b2a", ("GPU-8932f937", "MIG-7b2a")),
    ],
)
def test_cuda_visible_devices_leaves_some(tmp_path: Path, visible: str, names: tuple[str, ...]) -> None:
    found = visible_gpus({**NO_TOOLS, "CUDA_VISIBLE_DEVICES": visible}, machine(tmp_path, gpus=4))
    assert found.names == names
    assert f"CUDA_VISIBLE_DEVICES={visible} of 4" in found.source


def test_a_machine_without_a_driver_has_none(tmp_path: Path) -> None:
    assert visible_gpus(NO_TOOLS, tmp_path).names == ()
    assert visible_gpus({**NO_TOOLS, "CUDA_VISIBLE_DEVICES": "0,1"}, tmp_path).names == ()


def test_a_driver_without_device_files_leaves_the_count_to_torch(tmp_path: Path) -> None:
    (tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0").mkdir(parents=True)
    import torch

    expected = torch.cuda.device_count() if torch.cuda.is_available() else 0
    assert len(visible_gpus(NO_TOOLS, tmp_path).names) == expected
    assert visible_gpus({**NO_TOOLS, "CUDA_VISIBLE_DEVICES": ""}, tmp_path).names == ()
