"""Measures every row of the benchmark in turn and writes one table; `make bench` calls it.

Each row runs in a process of its own, every other repeat in reverse order, so that a machine that slows down does not
favour the first rows. What is measured already is kept: start it again to continue, or to add repeats or rows. A change
of the code, of the workload or of the number of threads measures anew.
"""

import argparse
import dataclasses
import datetime
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import table
from benchmarks.prepare import data_path
from benchmarks.table import Record
from benchmarks.workload import Measurement, Workload, read_workload, steps_file, workload_file, write_json
from megatron_spin import cli, machine
from megatron_spin.errors import ConfigError, GateError

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = ("benchmarks", "megatron_spin", "tools")
TRL_PYTHON = REPOSITORY / ".bench-venv" / "bin" / "python"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: a module of this package that takes a workload and ``--out``."""

    name: str
    title: str
    module: str
    arguments: tuple[str, ...] = ()
    needs_trl: bool = False


ROWS = (
    Row("ours", "Megatron-SPIN, padded", "benchmarks.ours"),
    Row("trl", "TRL DPOTrainer", "benchmarks.trl_dpo", needs_trl=True),
    Row("trl-precomputed", "TRL, precomputed", "benchmarks.trl_dpo", ("--precompute",), needs_trl=True),
    Row("bound-packed", "bound, packed", "benchmarks.bound", ("--layout", "packed")),
    Row("bound-shared", "bound, shared prompts", "benchmarks.bound", ("--layout", "shared")),
)
YARDSTICK = "TRL, precomputed"


class Bench:
    """One directory of measurements."""

    def __init__(self, out: Path, *, threads: int, trl_python: Path) -> None:
        self.out = out
        self.threads = threads
        self.trl_python = trl_python

    @property
    def workload(self) -> Path:
        return self.out / "workload"

    def prepare(self, data: Path | None) -> None:
        """Makes the workload, unless it is there already and of the same data."""
        origin = self.out / "origin.txt"
        wanted = "word problems" if data is None else hashlib.sha256(data.read_bytes()).hexdigest()
        if workload_file(self.workload).exists() and origin.exists() and origin.read_text() == wanted:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        origin.unlink(missing_ok=True)
        given = [] if data is None else ["--data", str(data)]
        self._run("prepare", [sys.executable, "-m", "benchmarks.prepare", "--out", str(self.workload), *given])
        origin.write_text(wanted)

    def key(self) -> str:
        """Hash of everything that the figures depend on."""
        digest = hashlib.sha256(f"{self.threads} threads\n".encode())
        for path in [workload_file(self.workload), steps_file(self.workload), *source_files()]:
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def record(self, row: Row, repeat: int, key: str) -> Record | None:
        """The record of an earlier run, or None if there is none of this key."""
        path = self._record_file(row, repeat)
        if not path.exists():
            return None
        plain = json.loads(path.read_text())
        record = Record(**{**plain, "measurement": Measurement(**plain["measurement"])})
        return record if record.key == key else None

    def measure(self, row: Row, repeat: int, key: str) -> Record:
        """Runs ``row`` once and keeps what it measured.

        Raises:
            GateError: the row failed; names its log.
        """
        result = self.out / "measurements" / f"{row.name}-{repeat}.result.json"
        python = str(self.trl_python) if row.needs_trl else sys.executable
        command = [python, "-m", row.module, str(self.workload), *row.arguments, "--out", str(result)]
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        clock, usage = time.perf_counter(), ProcessorTime.now()
        self._run(f"{row.name}-{repeat}", command)
        wall = time.perf_counter() - clock
        measurement = Measurement(**json.loads(result.read_text()))
        record = Record(row.name, repeat, key, started, round(wall, 3), usage.others_since(), measurement)
        write_json(self._record_file(row, repeat), record)
        result.unlink()
        return record

    def _record_file(self, row: Row, repeat: int) -> Path:
        return self.out / "measurements" / f"{row.name}-{repeat}.json"

    def _run(self, name: str, command: Sequence[str]) -> None:
        log = self.out / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": str(self.threads),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        with open(log, "w") as file:
            finished = subprocess.run(command, stdout=file, stderr=file, env=environment, check=False)
        if finished.returncode:
            lines = log.read_text().strip().splitlines() or ["(no output)"]
            raise GateError(
                f"{name} failed with status {finished.returncode} ({lines[-1]}): the whole output is in {log}"
            )


@dataclasses.dataclass(frozen=True)
class ProcessorTime:
    """Processor seconds that this machine and this process's children had used at one moment."""

    clock: float
    machine: float | None
    """None where /proc/stat does not say."""
    children: float

    @classmethod
    def now(cls) -> "ProcessorTime":
        own = resource.getrusage(resource.RUSAGE_CHILDREN)
        return cls(time.perf_counter(), busy_seconds(), own.ru_utime + own.ru_stime)

    def others_since(self) -> float | None:
        """Share of the machine's processor time that all other processes have taken since then."""
        now = ProcessorTime.now()
        if self.machine is None or now.machine is None:
            return None
        others = (now.machine - self.machine) - (now.children - self.children)
        available = (now.clock - self.clock) * (os.cpu_count() or 1)
        return round(max(0.0, others / available), 4)


def busy_seconds() -> float | None:
    """Processor seconds that were not idle since this machine started, over all its processors."""
    try:
        first = Path("/proc/stat").read_text().splitlines()[0]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, interrupts, soft_interrupts, stolen = map(int, first.split()[1:9])
    return (user + nice + system + interrupts + soft_interrupts + stolen) / os.sysconf("SC_CLK_TCK")


def source_files() -> list[Path]:
    """Every file whose change may change a figure."""
    files = [path for folder in SOURCES for path in (REPOSITORY / folder).rglob("*.py")]
    files += [REPOSITORY / "benchmarks" / "ours.yaml", REPOSITORY / "benchmarks" / "trl.lock"]
    return sorted(files)


def turns(rows: Sequence[Row], repeats: int) -> Iterator[tuple[int, Row]]:
    """Repeat and row of each run, in order; every other repeat goes through the rows backwards."""
    for repeat in range(1, repeats + 1):
        for row in rows if repeat % 2 else reversed(rows):
            yield repeat, row


def chosen_rows(names: str | None) -> list[Row]:
    """The rows that the comma-separated ``names`` name, in the table's order; None: all.

    Raises:
        ConfigError: there is no such row.
    """
    if names is None:
        return list(ROWS)
    wanted = names.split(",")
    known = [row.name for row in ROWS]
    for name in wanted:
        if name not in known:
            raise ConfigError(f"--rows {names}: there is no row {name!r}, the rows are {', '.join(known)}")
    return [row for row in ROWS if row.name in wanted]


def measure_all(bench: Bench, rows: Sequence[Row], repeats: int) -> list[Record]:
    """The records of every row and repeat; measures those that are missing and tells how it goes."""
    key = bench.key()
    records = []
    total = len(rows) * repeats
    for number, (repeat, row) in enumerate(turns(rows, repeats), start=1):
        record = bench.record(row, repeat, key)
        kept = record is not None
        if record is None:
            print(f"[{number}/{total}] {row.title} ...", flush=True)
            record = bench.measure(row, repeat, key)
        speed, peak = record.measurement.pairs_per_second, record.measurement.peak_mb
        note = "measured before" if kept else f"{record.wall_seconds:.0f} s"
        print(f"[{number}/{total}] {row.title}: {speed:.2f} pairs/s, {peak:,.0f} MB ({note})", flush=True)
        records.append(record)
    return records


def write_table(bench: Bench, rows: Sequence[Row], records: Sequence[Record]) -> str:
    """Writes ``table.md`` and ``results.json``; returns the text of the table."""
    summaries = []
    for row in rows:
        summaries.append(table.summarize(row.title, [record for record in records if record.row == row.name]))
    workload: Workload = read_workload(bench.workload)
    here = machine.machine_name()
    text = table.page(workload, summaries, records, yardstick=YARDSTICK, machine=here, threads=bench.threads)
    plain = table.as_json(workload, summaries, records, machine=here, threads=bench.threads)
    write_json(bench.out / "results.json", plain)
    (bench.out / "table.md").write_text(f"{text}\n")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="DIR", help="default: runs/bench")
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help="questions and answers (default: SPIN_GSM8K, else word problems)"
    )
    parser.add_argument("--repeats", type=int, default=2, metavar="N", help="runs per row (default: 2)")
    parser.add_argument("--rows", metavar="NAME,...", help=f"of {', '.join(row.name for row in ROWS)} (default: all)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="per process (default: 2)")
    parser.add_argument(
        "--trl-python", type=Path, default=TRL_PYTHON, metavar="FILE", help="interpreter that has TRL (see make bench)"
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help="Markdown file that gets the table, too")
    arguments = parser.parse_args()
    rows = chosen_rows(arguments.rows)
    if arguments.repeats < 1:
        raise ConfigError(f"--repeats {arguments.repeats} must be at least 1")
    if any(row.needs_trl for row in rows) and not arguments.trl_python.exists():
        raise ConfigError(
            f"{arguments.trl_python} does not exist: run `make bench`, which makes TRL's environment, or leave TRL "
            "out: --rows ours,bound-packed,bound-shared"
        )

    bench = Bench(arguments.out, threads=arguments.threads, trl_python=arguments.trl_python)
    bench.prepare(data_path(arguments.data))
    records = measure_all(bench, rows, arguments.repeats)
    text = write_table(bench, rows, records)
    print(f"\n{text}\n\n{bench.out / 'table.md'}, {bench.out / 'results.json'}")
    if arguments.page is not None:
        from scripts.update_readme import replace_block

        replaced = replace_block(arguments.page, text, name="speed")
        arguments.page.write_text(replaced)


if __name__ == "__main__":
    cli.run(main)
