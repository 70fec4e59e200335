"""Errors: one line on stderr, whatever the number of ranks, whoever else writes and whether a bar is being drawn."""

import os
import pty
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import environment, one_line
from tests.support.terminal import drawn

FAIL = """
from megatron_spin import cli
from megatron_spin.errors import ConfigError

def main():
    raise ConfigError("spin.beta=0\\nmust be greater than 0")

cli.run(main)
"""
DEFECT = """
from megatron_spin import cli

def main():
    [][0]

cli.run(main)
"""
FAIL_WITH_A_BAR = """
from megatron_spin import cli, log
from megatron_spin.errors import ConfigError

def main():
    progress = log.Progress("work", total=10, unit="row").__enter__()
    progress.update(3)
    raise ConfigError("no more rows")

cli.run(main)
"""
Ran = list[subprocess.CompletedProcess[str]]


def run_ranks(script: str, count: int, **variables: str) -> Ran:
    """Runs ``script`` on ``count`` ranks at once, as a launcher does; ``{rank}`` in a variable is the rank's number."""
    processes = []
    for rank in range(count):
        own = {name: value.format(rank=rank) for name, value in variables.items()}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", script],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment(RANK=str(rank), WORLD_SIZE=str(count), **own),
            )
        )
    finished = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        finished.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return finished


def said(ran: Ran) -> str:
    return "".join(process.stderr for process in ran)


def test_one_process_says_its_error_in_one_line() -> None:
    [ran] = run_ranks(FAIL, 1)
    assert one_line(ran, 2) == "error: spin.beta=0 must be greater than 0"
    assert ran.stderr == "error: spin.beta=0 must be greater than 0\n"


@pytest.mark.parametrize("count", [2, 8])
def test_of_ranks_that_fail_at_once_one_speaks(tmp_path: Path, count: int) -> None:
    """torchrun gives each rank a file in the directory of its attempt."""
    (tmp_path / "attempt_0").mkdir()
    ran = run_ranks(FAIL, count, TORCHELASTIC_ERROR_FILE=f"{tmp_path}/attempt_0/{{rank}}/error.json")
    assert [process.returncode for process in ran] == [2] * count
    assert said(ran) == "error: spin.beta=0 must be greater than 0\n"
    assert [path.name for path in (tmp_path / "attempt_0").iterdir()] == ["spin_error"]


@pytest.mark.parametrize("count", [1, 8])
def test_under_the_driver_none_speaks_and_the_driver_is_told(tmp_path: Path, count: int) -> None:
    ran = run_ranks(FAIL, count, SPIN_ERROR_FILE=str(tmp_path / "error"))
    assert [process.returncode for process in ran] == [2] * count
    assert not said(ran)
    assert (tmp_path / "error").read_text() == "2\tspin.beta=0 must be greater than 0\n"
    assert [path.name for path in tmp_path.iterdir()] == ["error"]


def test_an_error_that_the_driver_cannot_be_told_is_said(tmp_path: Path) -> None:
    [ran] = run_ranks(FAIL, 1, SPIN_ERROR_FILE=str(tmp_path / "missing/error"))
    assert one_line(ran, 2) == "error: spin.beta=0 must be greater than 0"


def test_a_defect_keeps_its_traceback(tmp_path: Path) -> None:
    [ran] = run_ranks(DEFECT, 1, SPIN_ERROR_FILE=str(tmp_path / "error"))
    assert ran.returncode == 1
    assert "Traceback" in ran.stderr
    assert (tmp_path / "error").read_text() == "1\tIndexError: list index out of range\n"


def test_what_follows_from_the_first_failure_goes_to_the_run_log(tmp_path: Path) -> None:
    """Such as a connection to the rank that has failed."""
    (tmp_path / "error").write_text("2\tthe cause\n")
    opened = f"""
from pathlib import Path
from megatron_spin import log
log.setup()
log.open_run_log(Path({str(tmp_path / "run.log")!r}), phase="train:0")
"""
    [ran] = run_ranks(opened + DEFECT, 1, SPIN_ERROR_FILE=str(tmp_path / "error"))
    assert ran.returncode == 1
    assert not ran.stderr
    assert "Traceback" in (tmp_path / "run.log").read_text()
    assert (tmp_path / "error").read_text() == "2\tthe cause\n"


def test_an_error_line_is_one_write() -> None:
    """Else what another process writes into the same pipe may come between the line and its end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # which keeps writes apart
    # Unbuffered, as the driver runs the tools: print() would write the line break by itself.
    process = subprocess.Popen([sys.executable, "-u", "-c", FAIL], stderr=theirs.fileno(), env=environment())
    theirs.close()
    assert ours.recv(1000) == b"error: spin.beta=0 must be greater than 0\n"
    assert process.wait() == 2
    ours.close()


def test_an_error_after_a_bar_has_a_line_of_its_own() -> None:
    screen, end = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", FAIL_WITH_A_BAR], stdout=end, stderr=end, env=environment())
    os.close(end)
    shown = drawn(screen)
    os.close(screen)
    assert process.wait() == 2
    assert re.search(r"work: +30%\|.*\r\nerror: no more rows\r\n$", shown), shown


DONE = """
import atexit, os
from megatron_spin import cli

def main():
    atexit.register(os.abort)
    print("all done")

cli.run(main)
"""


def test_a_rank_that_is_done_leaves_without_destructors() -> None:
    """A gloo thread that outlived the process group ended a finished training with SIGABRT, seen on a busy machine."""
    ran = subprocess.run(
        [sys.executable, "-c", DONE],
        capture_output=True,
        text=True,
        env=environment(RANK="1", WORLD_SIZE="2"),
        check=False,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "all done\n"
