"""Installs each lower bound of setup.py and imports the modules that use it: ``make check-ranges``.

Each bound gets an environment of its own for the time of its check. What it needs itself is resolved by pip; everything
else is taken from the environment that runs this script, as make setup made it. Bounds that no wheel fits here (another
Python, a GPU) are named as such. A bound that is not true ends the script with status 1.
"""

import ast
import itertools
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

REPOSITORY = Path(__file__).resolve().parents[1]
TRAINING = "megatron_spin.parallel.cpu_device as adapter; adapter.install(); import megatron_spin.phases.train"
MODULES = {
    "megatron-core": TRAINING,
    "torch": TRAINING,
    "transformers": "megatron_spin.generation.hf_engine, megatron_spin.evaluation.logps",
    "vllm": "megatron_spin.generation.vllm_worker, vllm; from vllm.utils.torch_utils import set_random_seed",
}
"""What is imported for each distribution with a lower bound."""


def lower_bounds() -> Iterator[tuple[Requirement, str]]:
    """Each requirement of setup.py with a lower bound, and that version."""
    constants = {}
    for node in ast.parse((REPOSITORY / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            constants[node.targets[0].id] = ast.literal_eval(node.value)
    for line in itertools.chain(constants["DEPENDENCIES"], *constants["EXTRAS"].values()):
        requirement = Requirement(line)
        for bound in requirement.specifier:
            if bound.operator == ">=":
                yield requirement, bound.version


def check(requirement: Requirement, version: str) -> str:
    """What became of one bound: ``ok``, ``not here: ...`` or ``FAILED: ...``."""
    if requirement.marker is not None and not requirement.marker.evaluate():
        return f"not here: it is for {requirement.marker}"
    modules = MODULES.get(requirement.name)
    if modules is None:
        return "not here: it runs on GPUs only"
    with tempfile.TemporaryDirectory() as directory:
        python = _environment(Path(directory))
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
        installed = subprocess.run(
            [*pip, "--only-binary", ":all:", f"{requirement.name}=={version}"], capture_output=True, text=True
        )
        if installed.returncode:
            return f"not here: {_last_line(installed.stderr)}"
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        # Also that it is the bound that was imported, and not the version behind it.
        code = f"import {modules}; from importlib.metadata import version; print(version('{requirement.name}'))"
        imported = subprocess.run([python, "-c", code], capture_output=True, text=True, env=environment, cwd=directory)
        if imported.returncode:
            return f"FAILED: {_last_line(imported.stderr)}"
        found = _last_line(imported.stdout)
        return f"ok ({found})" if Version(found).release[:2] == Version(version).release[:2] else f"FAILED: got {found}"


def _environment(directory: Path) -> Path:
    """An empty environment that sees the packages of this one behind its own; returns its interpreter."""
    venv.create(directory / "venv", with_pip=False, symlinks=True)
    python = directory / "venv/bin/python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    (own / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no message"


def main() -> None:
    """Prints one line per bound."""
    failed = False
    for requirement, version in lower_bounds():
        outcome = check(requirement, version)
        failed |= outcome.startswith("FAILED")
        print(f"{requirement.name + '>=' + version:<28} {outcome}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
