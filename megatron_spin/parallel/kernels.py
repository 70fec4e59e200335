"""Which kernels run: Transformer Engine's, Megatron's local ones, torch's; and what must not be mistaken for one."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_spin.config import Config
from megatron_spin.errors import DeviceError
from megatron_spin.machine import version_of

if TYPE_CHECKING:
    from megatron_spin.parallel.dims import ParallelDims


def layer_spec(config: Config, device_type: str) -> Literal["local", "transformer_engine"]:
    """The layer spec that ``auto`` stands for."""
    if config.layer_spec != "auto":
        return config.layer_spec
    return "transformer_engine" if device_type == "cuda" and version_of("transformer-engine") else "local"


def check_layer_spec(config: Config, device_type: str) -> None:
    """Refuses a layer spec that cannot run here.

    Raises:
        DeviceError: Transformer Engine was asked for and is not installed, or the device is a CPU.
    """
    available = version_of("transformer-engine") is not None and device_type == "cuda"
    if config.layer_spec == "transformer_engine" and not available:
        raise DeviceError(
            "layer_spec=transformer_engine needs a GPU and Transformer Engine installed: set layer_spec: auto or local"
        )


def refuse_wrong_apex() -> None:
    """Refuses PyPI's ``apex``, another project; if it can be imported, Megatron picks norms that it does not have and
    fails far from the cause.

    Raises:
        DeviceError: the ``apex`` that Python finds is not NVIDIA's.
    """
    spec = importlib.util.find_spec("apex")  # finds the package without running it
    if spec is None:
        return
    places = list(spec.submodule_search_locations or [])
    if not any((Path(place) / "normalization").is_dir() for place in places):
        raise DeviceError(
            f"the package apex at {places[0] if places else spec.origin} is not NVIDIA's (PyPI's apex is another "
            "project): run `pip uninstall apex`; NVIDIA's is built from its source"
        )


def announce(dims: "ParallelDims", config: Config) -> str:
    """One line: device, layout, numbers, kernels and versions."""
    import torch  # here, not above: what is checked before anything is started needs none of it

    device = f"CPU ({torch.get_num_threads()} threads per rank, gloo)"
    if dims.device.type == "cuda":
        device = torch.cuda.get_device_name(dims.device)
    layout = f"tensor {dims.tp_size} x pipeline {dims.pp_size} x data {dims.dp_size}"
    precision: str = config.precision.dtype
    if config.precision.fp8:
        precision += f" with FP8 {config.precision.fp8}"
    packages = ("torch", "megatron-core", "transformer-engine", "apex")
    versions = ", ".join(f"{package} {version_of(package) or 'absent'}" for package in packages)
    kernels = f"{_layers(config, dims.device.type)}; {_optimizers(dims.device.type)} optimizers"
    return f"{device}; {layout}; {precision}; {kernels}{_hidden(dims.device.type)}; {versions}"


def _layers(config: Config, device_type: str) -> str:
    if config.model.provider is not None:
        return f"layers of {config.model.provider}"
    if layer_spec(config, device_type) == "transformer_engine":
        return "layers, attention and fusions of Transformer Engine"
    return "layers of Megatron's local spec with torch's SDPA attention and RMSNorm, nothing fused"


def _optimizers(device_type: str) -> str:
    """Whose fused optimizers Megatron takes: the first that is installed, on a GPU."""
    if device_type == "cuda" and version_of("transformer-engine"):
        return "Transformer Engine's"
    if device_type == "cuda" and version_of("apex"):
        return "apex's"
    return "torch's"


def _hidden(device_type: str) -> str:
    """What is installed but does not run on a CPU."""
    packages = [package for package in ("transformer-engine", "apex") if version_of(package)]
    if device_type == "cuda" or not packages:
        return ""
    return f" ({' and '.join(packages)} not used on a CPU)"
