"""Narration: one logger with time and rank, and progress as a bar or as plain lines. No torch.

``12:03:41 message`` goes to stdout, ``12:03:41 warning: message`` to stderr. Rank 0 speaks at INFO, the other ranks at
WARNING and with their number (``12:03:41 [rank 3] message``); ``SPIN_LOG_LEVEL`` overrides the level of all ranks. What
is said also goes to the file of :func:`open_run_log`, with date, phase and rank.
"""

import logging
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from megatron_spin.errors import ConfigError
from megatron_spin.processes import rank, world_size

if TYPE_CHECKING:
    import tqdm

LEVEL_VARIABLE = "SPIN_LOG_LEVEL"
TERMINAL_VARIABLE = "SPIN_TERMINAL"
"""Names the terminal to draw bars on if stderr is not one: the driver's, whose phases write into pipes."""

SECONDS_BETWEEN_LINES = 30.0
"""Longest silence of progress in plain lines, as long as there is progress."""
SECONDS_BEFORE_TENTH = 2.0
"""A tenth of the work is worth a line only if it took this long: short work gets one line, at its end."""

logger = logging.getLogger("megatron_spin")


def setup() -> None:
    """Connects the logger with stdout and stderr, once per process, and silences the libraries' own bars.

    Call it before tqdm is imported: tqdm reads its environment only then.

    Raises:
        ConfigError: SPIN_LOG_LEVEL is not a level.
    """
    for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    if any(isinstance(handler, _Console) for handler in logger.handlers):
        return
    logger.setLevel(_level())
    logger.propagate = False
    logger.addHandler(_Console())


def open_run_log(path: Path, *, phase: str) -> None:
    """From now on, what is said is also appended to ``path``; lines are lost while its directory does not exist."""
    for handler in logger.handlers:
        if isinstance(handler, _RunLog):
            logger.removeHandler(handler)
    logger.addHandler(_RunLog(path, phase))


def to_run_log(text: str) -> bool:
    """Writes ``text`` to the run log alone; returns whether there is one."""
    is_written = False
    for handler in logger.handlers:
        if isinstance(handler, _RunLog):
            is_written |= handler.append(text)
    return is_written


def _level() -> int:
    name = os.environ.get(LEVEL_VARIABLE)
    if not name:
        return logging.INFO if rank() == 0 else logging.WARNING
    level = logging.getLevelNamesMapping().get(name.upper())
    if level is None:
        raise ConfigError(f"{LEVEL_VARIABLE}={name} is not a level: use DEBUG, INFO, WARNING or ERROR")
    return level


def _with_rank(message: str) -> str:
    return f"[rank {rank()}] {message}" if world_size() > 1 and rank() > 0 else message


class _Console(logging.Handler):
    """Writes to what sys.stdout and sys.stderr are at the time of each message."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stdout if record.levelno < logging.WARNING else sys.stderr
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = f"{clock} {_with_rank(prefix + record.getMessage())}\n"
        for bar in _bars:
            bar.clear()
        stream.write(line)
        stream.flush()
        if stream.isatty():  # else a pipe may still hold the line: the next update draws the bar below it
            for bar in _bars:
                bar.refresh()


class _RunLog(logging.Handler):
    """Appends to a file that several processes write to: each message is one write."""

    def __init__(self, path: Path, phase: str) -> None:
        super().__init__()
        self._path = path
        self._phase = phase

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        self.append(prefix + record.getMessage())

    def append(self, text: str) -> bool:
        """Appends ``text`` with date, phase and rank; returns False, without an exception, if it cannot be written."""
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self._phase} [rank {rank()}] {text}\n"
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError:  # no narration is worth stopping a run
            return False
        try:
            os.write(descriptor, line.encode())
        except OSError:
            return False
        finally:
            os.close(descriptor)
        return True


_bars: "list[tqdm.tqdm[Any]]" = []
"""The bars that are being drawn."""


def end_bars() -> None:
    """Ends the line of each bar that is being drawn, so that what follows has a line of its own."""
    while _bars:
        _bars.pop().close()


class Progress:
    """How far a piece of work has come: a bar on a terminal, plain lines elsewhere. Use it in a ``with`` block.

    A bar has rate and time left. Where there is no terminal, a line is logged for every tenth of the work, or every 30
    seconds if a tenth takes longer, and at the end.
    """

    def __init__(self, label: str, *, total: int, unit: str, done: int = 0, shown: bool | None = None) -> None:
        """``done`` of ``total`` units were done before. ``shown`` None: on rank 0 alone."""
        self._label = label
        self._total = total
        self._unit = unit
        self._first = self._done = done
        self._note = ""
        self._shown = rank() == 0 if shown is None else shown
        self._started = self._last_time = time.monotonic()
        self._terminal: TextIO | None = None
        self._bar: tqdm.tqdm[Any] | None = None

    def __enter__(self) -> "Progress":
        self._started = self._last_time = time.monotonic()
        self._terminal = _open_terminal() if self._shown else None
        if self._terminal is not None:
            from tqdm import tqdm

            # A terminal that nobody has given a size says that it has no columns.
            has_size = os.get_terminal_size(self._terminal.fileno()).columns > 0
            self._bar = tqdm(
                total=self._total,
                initial=self._done,
                desc=self._label,
                unit=self._unit,
                file=self._terminal,
                dynamic_ncols=has_size,
                ncols=None if has_size else 80,
                nrows=None if has_size else 24,
                disable=False,
            )
            _bars.append(self._bar)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            if self._bar in _bars:
                _bars.remove(self._bar)
            self._bar.close()
        elif self._shown and error is None and self._done > self._first:
            seconds = time.monotonic() - self._started
            self._say(f"{self._done:,} {self._unit}s in {_clock(seconds)}")
        if self._terminal is not None and self._terminal is not sys.stderr:
            self._terminal.close()

    def update(self, count: int = 1, *, note: str = "") -> None:
        """``count`` more units are done; ``note`` is shown behind the figures."""
        before = self._done
        self._done += count
        self._note = note
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif self._shown and self._first < self._done < self._total and self._is_time_for_a_line(before):
            self._last_time = time.monotonic()
            self._say_progress()

    def _is_time_for_a_line(self, before: int) -> bool:
        silent = time.monotonic() - self._last_time
        tenth = max(1, self._total // 10)
        crossed = self._done // tenth > before // tenth
        return silent >= SECONDS_BETWEEN_LINES or (crossed and silent >= SECONDS_BEFORE_TENTH)

    def _say_progress(self) -> None:
        seconds = time.monotonic() - self._started
        rate = (self._done - self._first) / seconds
        left = (self._total - self._done) / rate
        share = self._done / self._total
        figures = f"{self._done:,}/{self._total:,} {self._unit}s ({share:.0%})"
        self._say(f"{figures}, {rate:.3g} {self._unit}s/s, {_clock(left)} left")

    def _say(self, figures: str) -> None:
        logger.info(f"{self._label}: {figures}{', ' if self._note else ''}{self._note}")


def _open_terminal() -> TextIO | None:
    """The terminal to draw bars on; None if there is none."""
    if sys.stderr.isatty():
        return sys.stderr
    path = os.environ.get(TERMINAL_VARIABLE)
    if not path:
        return None
    try:
        terminal = os.fdopen(os.open(path, os.O_WRONLY | os.O_NOCTTY), "w")
    except OSError:  # it has been closed since, or belongs to somebody else
        return None
    if terminal.isatty():
        return terminal
    terminal.close()
    return None


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
