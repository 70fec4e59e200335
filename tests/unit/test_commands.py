"""The ``megatron-spin`` script: one command per tool, with the tool's own arguments and messages."""

import importlib
import subprocess
import sys
import tomllib

import pytest

from megatron_spin import __version__
from megatron_spin.__main__ import MODULES
from tests.support.runs import REPOSITORY, environment


def megatron_spin(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_spin", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60, check=False)


def test_the_script_is_this_module() -> None:
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"megatron-spin": "megatron_spin.__main__:main"}


def test_every_tool_is_a_command() -> None:
    tools = {path.stem for path in (REPOSITORY / "tools").glob("*.py")}
    assert set(MODULES.values()) == tools


@pytest.mark.parametrize("command", MODULES)
def test_every_command_has_a_main(command: str) -> None:
    assert callable(importlib.import_module(f"megatron_spin.commands.{MODULES[command]}").main)


def test_help_lists_the_commands() -> None:
    for arguments in ([], ["--help"]):
        shown = megatron_spin(*arguments)
        assert shown.returncode == 0, shown.stderr
        listed = [line.split()[0] for line in shown.stdout.splitlines() if line.startswith("  ")]
        assert listed == ["run", *MODULES]


def test_a_command_goes_by_its_own_name() -> None:
    shown = megatron_spin("import", "--help")
    assert shown.stdout.startswith("usage: megatron-spin import ")
    refused = megatron_spin("train", "--no-such-option")
    assert refused.returncode == 2
    assert refused.stderr.endswith("see megatron-spin train --help\n")
    assert refused.stderr.count("\n") == 1


def test_run_is_the_driver() -> None:
    shown = megatron_spin("run", "--help")
    assert shown.returncode == 0
    assert "--until PHASE:T" in shown.stdout


def test_an_unknown_command_is_refused() -> None:
    refused = megatron_spin("trian")
    assert refused.returncode == 2
    assert refused.stderr == "error: trian is not a command of megatron-spin: see megatron-spin --help\n"


def test_the_version_is_the_packages() -> None:
    assert megatron_spin("--version").stdout == f"{__version__}\n"
