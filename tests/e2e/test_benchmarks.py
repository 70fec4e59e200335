"""The benchmark from its workload to its table, with our tools and the bound; TRL needs an environment of its own."""

import sys
from pathlib import Path

import pytest

from benchmarks import prepare, run, table, workload

TINY = prepare.Sizes(
    num_pairs=8,
    pairs_per_step=4,
    warmup_steps=1,
    measured_steps=1,
    vocabulary=300,
    layers=2,
    hidden=64,
    ffn=96,
    heads=4,
    kv_heads=2,
)
NAMES = "ours,bound-packed,bound-shared"


@pytest.mark.slow
def test_our_tools_and_the_bound_do_the_same_work(tmp_path: Path) -> None:
    bench = run.Bench(tmp_path, threads=1, trl_python=Path(sys.executable))
    prepare.build(bench.workload, None, TINY)
    rows = run.chosen_rows(NAMES)
    records = run.measure_all(bench, rows, repeats=1)

    assert [record.row for record in records] == NAMES.split(",")
    expected = sum(pair.num_tokens for pair in workload.read_steps(bench.workload)[1])
    for record in records:
        assert record.measurement.pairs == TINY.pairs_per_step
        assert record.measurement.tokens == expected
        assert len(record.measurement.seconds) == TINY.measured_steps
        assert record.measurement.peak_mb > 100
    norms = [record.measurement.grad_norm for record in records]
    assert max(norms) - min(norms) < table.SAME_GRADIENT * max(norms)

    text = run.write_table(bench, rows, records)
    for row in rows:
        assert f"| {row.title} |" in text
    assert run.measure_all(bench, rows, repeats=1) == records, "a second start measures nothing again"
