"""Which kernels run: Transformer Engine's, Megatron's local ones, torch's; and what must not be mistaken for one."""

import functools
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_spin.config import Config
from megatron_spin.errors import DeviceError
from megatron_spin.machine import version_of

if TYPE_CHECKING:
    from megatron_spin.parallel.dims import ParallelDims


def layer_spec(config: Config, device_type: str) -> Literal["local", "transformer_engine"]:
    """The layer spec that ``auto`` stands for: Transformer Engine's for bf16 on a GPU that has it.

    Transformer Engine multiplies fp32 matrices in TF32, which keeps 10 bits of the mantissa, so fp32 takes the local
    spec.

    Raises:
        DeviceError: as :func:`has_transformer_engine`.
    """
    if config.layer_spec != "auto":
        return config.layer_spec
    if device_type == "cuda" and config.precision.dtype != "fp32" and has_transformer_engine():
        return "transformer_engine"
    return "local"


def check_layer_spec(config: Config, device_type: str) -> None:
    """Refuses a layer spec that cannot run here.

    Raises:
        DeviceError: Transformer Engine was asked for in fp32, or is not there, or the device is a CPU; or it is
            installed on a GPU machine and does not work there, whatever was asked for.
    """
    if config.layer_spec == "transformer_engine" and config.precision.dtype == "fp32":
        raise DeviceError(
            "layer_spec=transformer_engine does not compute in precision.dtype=fp32, since Transformer Engine "
            "multiplies fp32 matrices in TF32: set layer_spec: local, or precision.dtype: bf16"
        )
    available = device_type == "cuda" and has_transformer_engine()
    if config.layer_spec == "transformer_engine" and not available:
        raise DeviceError(
            "layer_spec=transformer_engine needs a GPU and Transformer Engine installed: continue where both are, or "
            "begin a run with layer_spec: auto or local"
        )


@functools.cache
def has_transformer_engine() -> bool:
    """Whether Megatron-Core has Transformer Engine's layers and optimizers; imports both if it is installed.

    Raises:
        DeviceError: it is installed, but Python or Megatron-Core cannot import it. Megatron-Core would go on without
            it and say nothing, or end in an error far from the cause.
    """
    version = version_of("transformer-engine")
    if version is None:
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401 # Transformer Engine's own __init__ hides why this fails
        from megatron.core.models.gpt import gpt_layer_specs
    except Exception as error:  # a library that does not load raises OSError, RuntimeError and others
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    else:
        if gpt_layer_specs.HAVE_TE:
            return True
        reason = "Megatron-Core cannot import it"
    raise DeviceError(
        f"Transformer Engine {version} is installed, but does not work ({reason}): install the build for torch "
        f"{version_of('torch')}, or uninstall it"
    )


def weight_gradient_fusion(config: Config, device_type: str) -> Literal["none", "layers", "all"]:
    """Which linear layers add their weight gradients to the fp32 sum in the matrix product itself.

    Transformer Engine's linears (``layers``) bring the kernel. Megatron's own, of which the output layer is always one,
    take that of apex, and with it Megatron's field ``gradient_accumulation_fusion`` can be on (``all``).
    """
    asked = config.model.transformer.get("gradient_accumulation_fusion", True)
    if device_type != "cuda" or not asked:
        return "none"
    if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None:
        return "all"
    return "layers" if layer_spec(config, device_type) == "transformer_engine" else "none"


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
    packages = ("torch", "megatron-core", "transformer-engine", "apex")
    versions = ", ".join(f"{package} {version_of(package) or 'absent'}" for package in packages)
    kernels = f"{_layers(config, dims.device.type)}; {_optimizers(dims.device.type)} optimizers"
    return f"{device}; {layout}; {config.precision.dtype}; {kernels}{_hidden(dims.device.type)}; {versions}"


def _layers(config: Config, device_type: str) -> str:
    if config.model.provider is not None:
        return f"layers of {config.model.provider}"
    if layer_spec(config, device_type) == "transformer_engine":
        return "layers, attention and fusions of Transformer Engine"
    return "layers of Megatron's local spec with torch's SDPA attention and RMSNorm, nothing fused"


def _optimizers(device_type: str) -> str:
    """Whose fused optimizers Megatron takes: the first that is installed, on a GPU."""
    if device_type == "cuda" and has_transformer_engine():
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
