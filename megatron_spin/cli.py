"""What every command line shares: arguments, one-line errors, exit statuses."""

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from megatron_spin import log, processes
from megatron_spin.config import Config, load_config
from megatron_spin.errors import ConfigError, SpinError

ERROR_FILE_VARIABLE = "SPIN_ERROR_FILE"
"""Names the file into which the first rank to fail writes ``STATUS<TAB>message``.

The driver sets it, reads the file after the phase has ended, and prints the message; the ranks print none themselves.
"""


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
    """Runs ``main``; turns what it raises into one line on stderr and an exit status (see :mod:`megatron_spin.errors`).

    Unexpected exceptions keep their traceback (status 1): they are defects, and the traceback is needed to fix them.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models and data are local paths: nothing is downloaded
    try:
        log.setup()
        main()
    except SpinError as error:
        _fail(str(error), error.exit_status)
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again to continue", 130)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _fail(
                f"no space left on the disk while writing {error.filename or 'a file'}: free some space and run the "
                "same command again",
                2,
            )
        _defect(error)
    except Exception as error:
        _defect(error)
    else:
        if processes.world_size() > 1:
            _leave(0)


def _defect(error: Exception) -> None:
    is_first = _is_first_to_fail(f"{type(error).__name__}: {error}", 1)
    trace = "".join(traceback.format_exception(error))
    # After another rank's failure this one is most likely its consequence: a peer that is gone, a collective cut off.
    if is_first or not log.to_run_log(trace):
        log.end_bars()
        sys.stderr.write(trace)
    _leave(1)


def _fail(message: str, status: int) -> None:
    line = " ".join(message.split())
    is_first = _is_first_to_fail(line, status)
    log.to_run_log(f"error: {line}")
    log.end_bars()
    named = os.environ.get(ERROR_FILE_VARIABLE)
    if is_first and not (named and os.path.exists(named)):
        # One write: print() makes two, and another process that shares the pipe can write between them.
        sys.stderr.write(f"error: {line}\n")
    _leave(status)


def _leave(status: int) -> None:
    # A process that belongs to a group must not run destructors. They may wait for peers that hang in a collective, and
    # gloo's threads may outlive what they use: then a phase that did all its work ends with SIGABRT.
    sys.stdout.flush()
    sys.stderr.flush()
    if processes.world_size() > 1:
        os._exit(status)
    sys.exit(status)


def _is_first_to_fail(message: str, status: int) -> bool:
    """Whether no other rank has failed before; if so, ``STATUS<TAB>message`` is left for the driver."""
    path = _error_file()
    if path is None:
        return True
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        draft.write_text(f"{status}\t{' '.join(message.split())}\n")
        os.link(draft, path)  # fails if it is there; there whole or not at all, however soon this process is killed
    except FileExistsError:
        return False
    except OSError:  # the directory is full or gone: two lines are better than none
        return True
    finally:
        draft.unlink(missing_ok=True)
    return True


def _error_file() -> Path | None:
    """Where the ranks of this phase agree on who failed first; None if nobody else could fail.

    The driver names it. torchrun gives each rank a file ``.../ATTEMPT/RANK/error.json``: the attempt's directory is the
    ranks' own.
    """
    named = os.environ.get(ERROR_FILE_VARIABLE)
    if named:
        return Path(named)
    of_rank = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if of_rank and processes.world_size() > 1:
        return Path(of_rank).parent.parent / "spin_error"
    return None
