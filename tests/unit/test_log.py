"""Narration: what a line looks like, where it goes, and progress with and without a terminal."""

import logging
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_spin import log
from megatron_spin.errors import ConfigError
from megatron_spin.log import Progress, logger
from tests.support.runs import environment
from tests.support.terminal import drawn

CLOCK = r"\d\d:\d\d:\d\d"
WORK = """
import sys
from megatron_spin import log
log.setup()
with log.Progress("work", total=5000, unit="row") as progress:
    for number in range(5000):
        progress.update(note=f"row {number}")
        if number == 2500:
            log.logger.info("half of it")
            log.logger.warning("the other half is left")
print("libraries:", __import__("tqdm").tqdm([]).disable)
"""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, to be set."""
    now = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    return now


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))


@pytest.mark.usefixtures("narration")
def test_a_line_has_the_time_and_goes_where_it_belongs(capsys: pytest.CaptureFixture[str]) -> None:
    logger.info("fine")
    logger.warning("odd")
    shown = capsys.readouterr()
    assert re.fullmatch(f"{CLOCK} fine\n", shown.out)
    assert re.fullmatch(f"{CLOCK} warning: odd\n", shown.err)


@pytest.fixture
def of_rank_3(monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(monkeypatch, 3, 8)


@pytest.mark.usefixtures("of_rank_3", "narration")
def test_the_other_ranks_only_warn_and_say_who_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    logger.info("fine")
    logger.warning("odd")
    shown = capsys.readouterr()
    assert not shown.out
    assert re.fullmatch(rf"{CLOCK} \[rank 3\] warning: odd\n", shown.err)


@pytest.fixture
def level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIN_LOG_LEVEL", "debug")


@pytest.mark.usefixtures("of_rank_3", "level", "narration")
def test_the_level_is_for_all_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    logger.debug("fine")
    assert re.fullmatch(rf"{CLOCK} \[rank 3\] fine\n", capsys.readouterr().out)


def test_a_level_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIN_LOG_LEVEL", "loud")
    monkeypatch.setattr(logger, "handlers", [])
    with pytest.raises(ConfigError, match="SPIN_LOG_LEVEL=loud is not a level: use DEBUG, INFO, WARNING or ERROR"):
        log.setup()


@pytest.mark.usefixtures("narration")
def test_the_run_log_has_date_phase_and_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log.open_run_log(tmp_path / "run.log", phase="prepare")
    logger.info("fine")
    log.open_run_log(tmp_path / "run.log", phase="train:0")
    as_rank(monkeypatch, 1, 2)
    logger.warning("odd")
    assert log.to_run_log("a traceback")
    first, second, third = (tmp_path / "run.log").read_text().splitlines()
    date = rf"\d{{4}}-\d\d-\d\d {CLOCK}"
    assert re.fullmatch(rf"{date} prepare \[rank 0\] fine", first)
    assert re.fullmatch(rf"{date} train:0 \[rank 1\] warning: odd", second)
    assert third.endswith("train:0 [rank 1] a traceback")


@pytest.mark.usefixtures("narration")
def test_a_run_log_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    assert not log.to_run_log("nowhere")
    log.open_run_log(tmp_path / "missing/run.log", phase="prepare")
    logger.info("fine")
    assert not log.to_run_log("lost")


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_a_line_every_tenth_of_the_work(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Progress("generate 0", total=1000, unit="prompt", shown=True) as progress:
        for number in range(1000):
            clock[0] += 0.1
            progress.update(note=f"{number} tokens/s")
    assert len(lines(caplog)) == 10
    assert lines(caplog)[1] == "generate 0: 200/1,000 prompts (20%), 10 prompts/s, 1:20 left, 199 tokens/s"
    assert lines(caplog)[-1] == "generate 0: 1,000 prompts in 1:40, 999 tokens/s"


def test_a_line_every_30_seconds_if_a_tenth_takes_longer(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Progress("train 0", total=100, done=50, unit="step", shown=True) as progress:
        for _ in range(4):
            clock[0] += 20
            progress.update()
    assert lines(caplog)[0] == "train 0: 52/100 steps (52%), 0.05 steps/s, 16:00 left"  # of the steps since the start
    assert len(lines(caplog)) == 3


def test_short_work_is_one_line(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Progress("scoring", total=1000, unit="prompt", shown=True) as progress:
        for _ in range(1000):
            clock[0] += 0.001
            progress.update()
    assert lines(caplog) == ["scoring: 1,000 prompts in 0:01"]


def test_work_that_fails_has_no_last_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with pytest.raises(ZeroDivisionError), Progress("scoring", total=10, unit="prompt", shown=True) as progress:
        progress.update(3)
        1 / 0  # noqa: B018
    assert not lines(caplog)


def test_only_rank_0_shows_progress(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    as_rank(monkeypatch, 1, 2)
    with Progress("scoring", total=1, unit="prompt") as progress:
        progress.update()
    assert not lines(caplog)


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Both ends of a terminal: what is drawn on the second can be read from the first."""
    screen, end = pty.openpty()
    yield screen, end
    os.close(screen)


def test_on_a_terminal_there_is_a_bar_and_other_lines_are_whole(terminal: tuple[int, int]) -> None:
    screen, end = terminal
    process = subprocess.Popen([sys.executable, "-c", WORK], stdout=end, stderr=end, env=environment())
    os.close(end)
    shown = drawn(screen)
    assert process.wait() == 0
    assert re.search(r"\rwork: +\d+%\|.*row/s", shown)
    assert "100%|" in shown
    for message in ("half of it", "warning: the other half is left"):
        assert re.search(rf"(^|[\r\n]) *{CLOCK} {message}\r\n", shown), shown[-2000:]
    assert "libraries: True" in shown


def test_the_drivers_terminal_has_the_bar_and_the_pipes_do_not(terminal: tuple[int, int]) -> None:
    screen, end = terminal
    process = subprocess.Popen(
        [sys.executable, "-c", WORK],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(SPIN_TERMINAL=os.ttyname(end)),
    )
    piped = "".join(process.communicate(timeout=60))
    os.close(end)
    assert "100%|" in drawn(screen)
    assert "\r" not in piped
    assert len(piped.splitlines()) == 3


def test_without_a_terminal_there_are_a_few_plain_lines(tmp_path: Path) -> None:
    unusable = environment(SPIN_TERMINAL=str(tmp_path / "no terminal"))
    ran = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True, env=unusable, check=True)
    assert "\r" not in ran.stdout + ran.stderr
    assert re.fullmatch(f"{CLOCK} warning: the other half is left\n", ran.stderr)
    assert len(ran.stdout.splitlines()) <= 3 + 10
    assert re.search(f"^{CLOCK} work: 5,000 rows in 0:0", ran.stdout, re.MULTILINE)
