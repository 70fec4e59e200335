"""Every tool explains itself quickly and without the heavy libraries' start-up noise."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLS = sorted((REPOSITORY / "tools").glob("*.py"))
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
PATIENCE = 5.0
"""Seconds; importing torch or transformers alone takes longer on a busy machine."""


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_help_of_every_tool(tool: Path) -> None:
    started = time.monotonic()
    ran = subprocess.run(
        [sys.executable, str(tool), "--help"], env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("usage: ") and len(ran.stdout.splitlines()) > 4 and not ran.stderr
    assert time.monotonic() - started < PATIENCE, "heavy imports belong inside main, behind the arguments"


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_an_unknown_option_is_the_users_mistake(tool: Path) -> None:
    ran = subprocess.run(
        [sys.executable, str(tool), "--no-such-option"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 2 and "Traceback" not in ran.stderr


def test_help_of_the_driver() -> None:
    ran = subprocess.run(
        [str(REPOSITORY / "tools/spin.sh"), "--help"], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0 and "--until PHASE:T" in ran.stdout and not ran.stderr


def test_all_tools_of_the_contract_are_there() -> None:
    contract = {"prepare", "import_hf", "export_hf", "generate", "train", "evaluate", "report"}
    assert contract <= {tool.stem for tool in TOOLS}
