"""``megatron-spin COMMAND ...``, also ``python -m megatron_spin COMMAND ...``: all tools under one name."""

import importlib
import os
import sys

import megatron_spin
from megatron_spin import cli
from megatron_spin.commands import COMMANDS
from megatron_spin.commands.plan import TOOLS
from megatron_spin.errors import ConfigError

PROGRAM = "megatron-spin"
MODULES = {module.removesuffix("_hf"): module for module in COMMANDS}
"""Command to module of :mod:`megatron_spin.commands`."""


def main() -> None:
    """The entry point of the script."""
    cli.run(_dispatch)


def _dispatch() -> None:
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(_usage())
    elif command == "--version":
        print(megatron_spin.__version__)
    elif command == "run":
        _drive(arguments)
    elif command in MODULES:
        sys.argv = [f"{PROGRAM} {command}", *arguments]  # what the command's own --help and errors call it
        importlib.import_module(f"megatron_spin.commands.{MODULES[command]}").main()
    else:
        raise ConfigError(f"{command} is not a command of {PROGRAM}: see {PROGRAM} --help")


def _drive(arguments: list[str]) -> None:
    driver = TOOLS / "spin.sh"
    if not driver.exists():
        raise ConfigError(f"{driver} does not exist: `{PROGRAM} run` needs the repository; install it with pip -e")
    os.execve(driver, [str(driver), *arguments], {**os.environ, "PYTHON": sys.executable})


def _usage() -> str:
    width = max(map(len, MODULES))
    lines = [f"usage: {PROGRAM} COMMAND [ARGUMENT...]", ""]
    lines.append(f"  {'run':{width}}  run a whole self-play: all of these phases in order")
    for command, module in MODULES.items():
        lines.append(f"  {command:{width}}  {COMMANDS[module]}")
    lines += ["", f"{PROGRAM} COMMAND --help explains a command; {PROGRAM} --version tells the version."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
