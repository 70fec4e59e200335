"""Command lines answer at once: the rooms that ``--help``, the plan and the report need import nothing heavy.

Which room may import which is a contract in pyproject.toml, checked by ``make lint``. That check cannot tell an import
inside a function, which is allowed here, from one at the head of a file.
"""

import subprocess
import sys

from tests.support.runs import REPOSITORY

LIGHT = (
    "__main__",
    "cli",
    "commands",
    "config",
    "errors",
    "evaluation",
    "io",
    "log",
    "machine",
    "phases/frame",
    "processes",
    "report",
    "run",
    "spin/objective",
    "training/preflight",
)
NEEDS_TORCH = {f"megatron_spin.evaluation.{name}" for name in ("answers", "logps", "measurement")}
HEAVY = ("torch", "megatron.core", "transformers", "vllm")

IMPORT_EACH = f"""
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    loaded = [heavy for heavy in {HEAVY!r} if heavy in sys.modules]
    if loaded:
        sys.exit(f"{{name}} imports {{loaded}}")
"""


def light_modules() -> list[str]:
    """Names of the modules in :data:`LIGHT` that exist, without those that need torch."""
    package = REPOSITORY / "megatron_spin"
    files = []
    for name in LIGHT:
        files += sorted((package / name).rglob("*.py"))
        files += package.glob(f"{name}.py")
    names = [".".join(file.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__") for file in files]
    return [name for name in names if name not in NEEDS_TORCH]


def test_light_modules_import_nothing_heavy() -> None:
    modules = light_modules()
    assert len(modules) > 20
    # One process for all of them: the first that imports something heavy is named.
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_EACH, *modules], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
