"""requirements.lock, which is installed without resolving dependencies, has what setup.py asks for."""

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


def read_lock() -> dict[NormalizedName, Version]:
    """The pinned version of each distribution, by its canonical name."""
    pins = {}
    for line in (REPOSITORY / "requirements.lock").read_text().splitlines():
        if not line.startswith("#"):
            name, version = line.split("==")
            pins[canonicalize_name(name)] = Version(version)
    return pins


DEPENDENCIES, EXTRAS = read_setup()
LOCKED = [*DEPENDENCIES, *EXTRAS["demo"], *EXTRAS["dev"]]
"""All but ``gpu``, which is for Python 3.12."""


@pytest.mark.parametrize("line", LOCKED)
def test_the_lock_has_every_dependency_in_its_range(line: str) -> None:
    requirement = Requirement(line)
    version = read_lock().get(canonicalize_name(requirement.name))
    assert version is not None, f"requirements.lock has no {requirement.name}"
    assert version in requirement.specifier


def test_no_extra_is_empty() -> None:
    assert [name for name, lines in EXTRAS.items() if not lines] == []
