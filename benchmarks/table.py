"""The table of a benchmark: medians and spreads over its repeats. Standard library only."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.workload import Measurement, Workload

QUIET = 0.05
"""Share of the machine that other processes may take before the table warns of them."""
SAME_GRADIENT = 0.01
"""Relative difference of the rows' first gradient norms above which they cannot be doing the same work."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One run of one row."""

    row: str
    repeat: int
    key: str
    """Hash of everything that the figures depend on: a record with another key is measured again."""
    started: str
    """UTC, ISO 8601."""
    wall_seconds: float
    """Of the whole process, start and reference log-probs included."""
    others: float | None
    """Share of the machine's processor time that other processes took meanwhile; None where it is unknown."""
    measurement: Measurement


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median, lowest and highest of a figure."""

    median: float
    lowest: float
    highest: float


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


@dataclasses.dataclass(frozen=True)
class Summary:
    """All runs of one row."""

    title: str
    runs: int
    pairs_per_second: Spread
    tokens_per_second: Spread
    peak_mb: Spread
    grad_norm: float
    """Median of the first gradient norms."""


def summarize(title: str, records: Sequence[Record]) -> Summary:
    """The summary of at least one record."""
    measured = [record.measurement for record in records]
    return Summary(
        title=title,
        runs=len(records),
        pairs_per_second=spread([one.pairs_per_second for one in measured]),
        tokens_per_second=spread([one.tokens_per_second for one in measured]),
        peak_mb=spread([one.peak_mb for one in measured]),
        grad_norm=statistics.median(one.grad_norm for one in measured),
    )


def markdown(summaries: Sequence[Summary], *, yardstick: str | None) -> str:
    """The table; the last column divides by the pairs/s of the row that is titled ``yardstick``, if it is there."""
    reference = next((one.pairs_per_second.median for one in summaries if one.title == yardstick), None)
    titles = ["", "pairs/s", "lowest to highest", "tokens/s", "peak MB"]
    if reference is not None:
        titles.append(f"against {yardstick}")
    lines = [line(titles), line(["---"] + ["---:"] * (len(titles) - 1))]
    for one in summaries:
        speed = one.pairs_per_second
        cells = [
            one.title,
            f"{speed.median:.2f}",
            f"{speed.lowest:.2f} to {speed.highest:.2f}",
            f"{one.tokens_per_second.median:,.0f}",
            f"{one.peak_mb.median:,.0f}",
        ]
        if reference is not None:
            cells.append(f"{speed.median / reference:.2f} x")
        lines.append(line(cells))
    return "\n".join(lines)


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def warnings(summaries: Sequence[Summary], records: Sequence[Record]) -> list[str]:
    """What a reader must know before trusting the table."""
    found = []
    known = [record.others for record in records if record.others is not None]
    if known and max(known) > QUIET:
        found.append(
            f"The machine was not quiet: other processes took up to {max(known):.0%} of its processors during a run."
        )
    norms = [one.grad_norm for one in summaries]
    if max(norms) - min(norms) > SAME_GRADIENT * max(norms):
        listed = ", ".join(f"{one.title} {one.grad_norm:.4g}" for one in summaries)
        found.append(f"The rows do not compute the same thing: their first gradient norms are {listed}.")
    return found


def page(
    workload: Workload,
    summaries: Sequence[Summary],
    records: Sequence[Record],
    *,
    yardstick: str | None,
    machine: str,
    threads: int,
) -> str:
    """The table with what was measured, where and when, as Markdown."""
    days = sorted({record.started[:10] for record in records})
    day = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    versions = sorted({record.measurement.versions for record in records})
    runs = " or ".join(str(count) for count in sorted({one.runs for one in summaries}))
    about = (
        f"DPO on {workload.num_pairs} pairs of {workload.source}, {workload.pairs_per_step} per step, a Llama of "
        f"{workload.parameters / 1e6:.1f} million parameters, fp32, {threads} threads. Each run counts "
        f"{workload.measured_steps} steps after {workload.warmup_steps} that do not count. Runs per row: {runs}, in "
        "alternating order; the figures are medians."
    )
    where = f"Measured {day} on {machine}. {'; '.join(versions)}."
    return "\n\n".join([markdown(summaries, yardstick=yardstick), about, where, *warnings(summaries, records)])


def as_json(
    workload: Workload, summaries: Sequence[Summary], records: Sequence[Record], *, machine: str, threads: int
) -> dict[str, Any]:
    """Everything that the table was made from, as plain data."""
    return {
        "workload": dataclasses.asdict(workload),
        "machine": machine,
        "threads": threads,
        "summaries": [dataclasses.asdict(one) for one in summaries],
        "records": [dataclasses.asdict(record) for record in records],
    }
