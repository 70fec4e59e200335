"""What every command line shares: arguments, one-line errors, exit statuses."""

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from megatron_spin.config import Config, load_config
from megatron_spin.errors import ConfigError, SpinError

ERROR_FILE_VARIABLE = "SPIN_ERROR_FILE"
"""Names a file into which the first failing process writes ``STATUS<TAB>message``; the driver reads it after torchrun has ended."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are one line, like any other bad input."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}: see {os.path.relpath(sys.argv[0])} --help")


def config_parser(description: str) -> argparse.ArgumentParser:
    """The arguments of a phase: ``CONFIG --run-dir DIR [key=value ...]``."""
    parser = Parser(description=description)
    parser.add_argument("config", metavar="CONFIG", help="YAML file; docs/configuration.md lists the keys")
    parser.add_argument("--run-dir", type=Path, help="run directory (default: runs/NAME, NAME from the config)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="overrides with dots, for example spin.beta=0.2"
    )
    return parser


def add_target(parser: argparse.ArgumentParser) -> None:
    """Adds ``--iteration T | --baseline NAME``, of which exactly one must be given."""
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--iteration", type=int, metavar="T", help="self-play iteration, from 0")
    target.add_argument(
        "--baseline", metavar="NAME", help="a name under `baselines` in the config, or sft for the model as it came"
    )


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses the command line; ``key=value`` may stand before, between and after options."""
    return parser.parse_intermixed_args()


def read_config(arguments: argparse.Namespace) -> tuple[Config, Path]:
    """The resolved configuration and the run directory of parsed :func:`config_parser` arguments."""
    config = load_config(Path(arguments.config), arguments.overrides)
    return config, arguments.run_dir or Path("runs") / config.name


def run(main: Callable[[], None]) -> None:
    """Runs ``main`` and turns what it raises into one line on stderr and an exit status (see :mod:`megatron_spin.errors`).

    Unexpected exceptions keep their traceback (status 1): they are defects, and whoever mends them needs it.
    """
    try:
        main()
    except SpinError as error:
        _fail(str(error), error.exit_status)
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again to continue", 130)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _fail(
                f"no space left on the disk while writing {error.filename or 'a file'}: free some space and run the same command again",
                2,
            )
        _defect(error)
    except Exception as error:
        _defect(error)


def _defect(error: Exception) -> None:
    _note(f"{type(error).__name__}: {error}", 1)
    traceback.print_exc()
    _leave(1)


def _fail(message: str, status: int) -> None:
    line = " ".join(message.split())
    _note(line, status)
    print(f"error: {line}", file=sys.stderr, flush=True)
    _leave(status)


def _leave(status: int) -> None:
    # A process that belongs to a group must not wait for its peers in destructors: they may hang in a collective.
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _note(message: str, status: int) -> None:
    path = os.environ.get(ERROR_FILE_VARIABLE)
    if not path:
        return
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    except OSError:  # another rank was first: its message is the cause, ours probably the consequence
        return
    with os.fdopen(descriptor, "w") as file:
        file.write(f"{status}\t{' '.join(message.split())}\n")
