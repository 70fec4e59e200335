"""The statistics and the text of the benchmark's table, and which runs are kept."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import run, table
from benchmarks.table import Record
from benchmarks.workload import Measurement, Workload, write_json
from megatron_spin.errors import ConfigError, GateError

WORKLOAD = Workload("some.jsonl", 320, 8, 1, 2, 12_600_000, 200, 180)


def record(row: str, repeat: int, *, seconds: list[float], peak: float = 1000.0, **fields: Any) -> Record:
    measured = Measurement(16, 4000, seconds, peak, grad_norm=2.0, versions="torch 1")
    plain = Record(row, repeat, "key", "2026-11-27T10:00:00+00:00", 9.0, others=0.01, measurement=measured)
    return dataclasses.replace(plain, **fields)


def test_speed_is_over_the_sum_of_the_steps() -> None:
    measured = record("a", 1, seconds=[1.0, 3.0]).measurement
    assert measured.pairs_per_second == 4.0
    assert measured.tokens_per_second == 1000.0


def test_warm_up_steps_do_not_count() -> None:
    assert WORKLOAD.measured([9.0, 1.0, 3.0]) == [1.0, 3.0]


def test_summary_has_median_lowest_and_highest() -> None:
    records = [
        record("a", i, seconds=[seconds], peak=peak) for i, (seconds, peak) in enumerate([(4, 1), (8, 3), (2, 2)])
    ]
    summary = table.summarize("A", records)
    assert summary.pairs_per_second == table.Spread(median=4.0, lowest=2.0, highest=8.0)
    assert summary.peak_mb == table.Spread(median=2.0, lowest=1.0, highest=3.0)
    assert summary.runs == 3


def test_the_table_divides_by_the_yardstick() -> None:
    summaries = [
        table.summarize("A", [record("a", 1, seconds=[4.0])]),
        table.summarize("B", [record("b", 1, seconds=[2.0])]),
    ]
    assert table.markdown(summaries, yardstick="A").splitlines() == [
        "|  | pairs/s | lowest to highest | tokens/s | peak MB | against A |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| A | 4.00 | 4.00 to 4.00 | 1,000 | 1,000 | 1.00 x |",
        "| B | 8.00 | 8.00 to 8.00 | 2,000 | 1,000 | 2.00 x |",
    ]


def test_without_the_yardstick_there_is_no_such_column() -> None:
    summary = table.summarize("A", [record("a", 1, seconds=[4.0])])
    assert "against" not in table.markdown([summary], yardstick="B")


def warnings_of(*records: Record) -> list[str]:
    return table.warnings([table.summarize(one.row, [one]) for one in records], records)


def test_a_quiet_machine_and_equal_gradients_need_no_warning() -> None:
    assert warnings_of(record("a", 1, seconds=[1.0]), record("b", 1, seconds=[1.0], others=None)) == []


def test_the_table_tells_of_a_busy_machine() -> None:
    (warning,) = warnings_of(record("a", 1, seconds=[1.0], others=0.31))
    assert "31%" in warning


def test_the_table_tells_of_rows_that_do_other_work() -> None:
    other = record("b", 1, seconds=[1.0])
    other = dataclasses.replace(other, measurement=dataclasses.replace(other.measurement, grad_norm=2.1))
    (warning,) = warnings_of(record("a", 1, seconds=[1.0]), other)
    assert "a 2, b 2.1" in warning


def test_the_page_says_what_was_measured_where_and_when() -> None:
    records = [record("a", 1, seconds=[1.0])]
    summaries = [table.summarize("A", records)]
    page = table.page(WORKLOAD, summaries, records, yardstick=None, machine="2 cores of X", threads=2)
    assert "320 pairs of some.jsonl" in page
    assert "12.6 million parameters" in page
    assert "Measured 2026-11-27 on 2 cores of X" in page
    assert "torch 1" in page


def test_every_other_repeat_is_reversed() -> None:
    names = [(repeat, row.name) for repeat, row in run.turns(run.ROWS[:2], 3)]
    assert names == [(1, "ours"), (1, "trl"), (2, "trl"), (2, "ours"), (3, "ours"), (3, "trl")]


def test_rows_keep_the_order_of_the_table() -> None:
    assert [row.name for row in run.chosen_rows("bound-packed,ours")] == ["ours", "bound-packed"]


def test_an_unknown_row_is_named() -> None:
    with pytest.raises(ConfigError, match="'fast'"):
        run.chosen_rows("ours,fast")


@pytest.fixture
def bench(tmp_path: Path) -> run.Bench:
    return run.Bench(tmp_path, threads=2, trl_python=Path("/nowhere"))


def test_a_record_is_kept_while_its_key_holds(bench: run.Bench) -> None:
    row = run.ROWS[0]
    write_json(bench.out / "measurements" / f"{row.name}-1.json", record(row.name, 1, seconds=[1.0]))
    assert bench.record(row, 1, "key") == record(row.name, 1, seconds=[1.0])
    assert bench.record(row, 1, "another key") is None
    assert bench.record(row, 2, "key") is None


def test_the_key_changes_with_the_threads_and_the_steps(bench: run.Bench) -> None:
    write_json(bench.workload / "workload.json", WORKLOAD)
    (bench.workload / "steps.jsonl").write_text("[]\n")
    keys = {bench.key(), run.Bench(bench.out, threads=1, trl_python=Path("/nowhere")).key()}
    (bench.workload / "steps.jsonl").write_text("[]\n[]\n")
    keys.add(bench.key())
    assert len(keys) == 3


def test_a_failing_row_names_its_log(bench: run.Bench) -> None:
    row = run.Row("broken", "broken", "benchmarks.no_such_module")
    with pytest.raises(GateError, match=r"broken-1 failed with status 1 .*no_such_module.*/logs/broken-1\.log"):
        bench.measure(row, 1, "key")


def test_the_results_are_plain_data(bench: run.Bench) -> None:
    write_json(bench.workload / "workload.json", WORKLOAD)
    row = run.ROWS[0]
    text = run.write_table(bench, [row], [record(row.name, 1, seconds=[1.0])])
    assert (bench.out / "table.md").read_text() == f"{text}\n"
    results = json.loads((bench.out / "results.json").read_text())
    assert results["summaries"][0]["title"] == row.title
    assert results["records"][0]["measurement"]["pairs"] == 16


def test_processor_time_of_others_is_a_share() -> None:
    others = run.ProcessorTime.now().others_since()
    assert others is None or others >= 0
