"""``metrics.jsonl``: rows of a file that is still being written, and of one that is damaged."""

from pathlib import Path

import pytest

from megatron_spin.errors import RunDirError
from megatron_spin.run.step_metrics import StepMetrics, load_step_metrics

LINES = '{"step": 1, "loss": 0.7, "margin": null}\n{"step": 2, "loss": NaN, "margin": 0.5}\n'


def test_rows_in_order(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert load_step_metrics(path) == []
    path.write_text(LINES)
    first, second = load_step_metrics(path)
    assert first == StepMetrics(1, {"step": 1, "loss": 0.7, "margin": None})
    assert second.step == 2


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_half_a_last_line_is_left_out(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(LINES[:-cut])
    assert [row.step for row in load_step_metrics(path)] == [1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": 2, "lo', "line 2 is not JSON"),
        ("[2]", "line 2 is not the row"),
        ('{"loss": 1}', "line 2 is not the row"),
    ],
)
def test_a_damaged_row_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    first, last = LINES.splitlines()
    path.write_text("\n".join([first, line, last, ""]))
    with pytest.raises(RunDirError, match=message):
        load_step_metrics(path)
