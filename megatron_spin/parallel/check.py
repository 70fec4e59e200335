"""What process groups, device and Megatron's version must fulfil, checked before anything is started. No torch."""

import importlib.metadata
from pathlib import Path

from packaging.specifiers import SpecifierSet

from megatron_spin.config import Config
from megatron_spin.errors import DeviceError
from megatron_spin.hf.assets import read_hf_config
from megatron_spin.parallel.kernels import check_layer_spec
from megatron_spin.parallel.layout import check_layout

TESTED = SpecifierSet(">=0.16.1,<0.20", prereleases=True)
"""Versions of megatron-core with which the calls that :mod:`.cpu_device` replaces were checked.

All tests run with 0.16.1 (`make test`, `make test-slow`); unit and distributed tests with 0.19.2, and with Transformer
Engine 2.20.2 constructed on the CPU (`make test-latest`); training with a save and a load with 0.17.1 and 0.18.2.
"""


def check_config(config: Config, device_type: str, *, world_size: int) -> None:
    """Checks all of device, layout and batch that needs no process group.

    Args:
        device_type: ``cpu`` or ``cuda``.

    Raises:
        DeviceError: the layer spec cannot run on such a device.
        ConfigError: the model or the batch cannot be cut over ``world_size`` processes.
        CheckpointError: ``model.hf`` has no readable config.json.
    """
    check_layer_spec(config, device_type)
    check_layout(config, read_hf_config(Path(config.model.hf)), world_size=world_size)


def check_version() -> str:
    """The installed megatron-core version.

    Raises:
        DeviceError: it is missing or outside :data:`TESTED`.
    """
    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        raise DeviceError("megatron-core is not installed: run `make setup`") from None
    refuse_untested(version)
    return version


def refuse_untested(version: str) -> None:
    """Raises :class:`DeviceError` for a megatron-core version outside :data:`TESTED`, as 0.20's pre-releases are."""
    if version not in TESTED:
        raise DeviceError(
            f"megatron-core {version} is outside the tested range >=0.16.1,<0.20: install a version within it"
        )
