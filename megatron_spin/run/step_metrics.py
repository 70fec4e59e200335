"""``metrics.jsonl``, read: what each optimizer step of one training reported. No torch."""

import dataclasses
from pathlib import Path

from megatron_spin.errors import RunDirError
from megatron_spin.io import read_json_lines


@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """One row."""

    step: int
    """From 1."""
    values: dict[str, float | None]
    """All columns by name, ``step`` included; None if the objective does not report them."""


def load_step_metrics(path: Path) -> list[StepMetrics]:
    """The rows in order; none if there is no file. The last one is left out if it was not written to its end.

    Raises:
        RunDirError: a row is damaged.
    """
    rows = []
    for number, values in enumerate(read_json_lines(path), start=1):
        if not isinstance(values, dict) or not isinstance(values.get("step"), int):
            raise RunDirError(f"{path} line {number} is not the row of a step: restore the file")
        rows.append(StepMetrics(values["step"], values))
    return rows
