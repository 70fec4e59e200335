"""What numbers depend on besides weights, data and layout: device, kernels and versions, resolved once per phase."""

import dataclasses
from typing import TYPE_CHECKING, Any

from megatron_spin import machine
from megatron_spin.config import Config
from megatron_spin.machine import version_of
from megatron_spin.parallel.kernels import layer_spec

if TYPE_CHECKING:
    import torch

PACKAGES = ("megatron-spin", "torch", "megatron-core", "transformer-engine", "apex", "flash-attn", "flash-attn-3")
"""Packages whose code and kernels compute."""


@dataclasses.dataclass(frozen=True)
class Stack:
    """Everything in words, so that it can be kept in a file and compared."""

    device: str
    """The GPU's name, or the CPU model."""
    layer_spec: str
    """``local``, ``transformer_engine`` or the user's provider."""
    attention: str
    """Whose attention kernel runs."""
    deterministic: bool
    versions: dict[str, str]
    """Of each of :data:`PACKAGES` that is installed, and of CUDA and cuDNN as torch has them."""

    def as_record(self) -> dict[str, Any]:
        """Plain data for a file."""
        return dataclasses.asdict(self)


def resolve_stack(config: Config, device: "torch.device") -> Stack:
    """What ``config`` comes to on ``device``."""
    import torch

    spec = layer_spec(config, device.type)
    attention = "Transformer Engine" if spec == "transformer_engine" else "torch SDPA"
    versions = {package: version_of(package) for package in PACKAGES}
    name = machine.cpu_model()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        versions |= {"CUDA": torch.version.cuda, "cuDNN": str(torch.backends.cudnn.version())}
    return Stack(
        device=name,
        layer_spec=config.model.provider or spec,
        attention=config.model.provider or attention,
        deterministic=config.training.deterministic,
        versions={package: version for package, version in versions.items() if version is not None},
    )


def stack_changes(before: dict[str, Any], now: Stack) -> list[str]:
    """What differs from ``before``, the record of a stack, to ``now``: ``torch 2.12.0 -> 2.13.0``."""
    old, new = _flat(before), _flat(now.as_record())
    names = [*new, *(name for name in old if name not in new)]
    return [f"{name} {old.get(name)} -> {new.get(name)}" for name in names if old.get(name) != new.get(name)]


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in record.items() if name != "versions"}
    return {**rest, **record.get("versions", {})}
