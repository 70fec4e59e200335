"""Tables and the report on the terminal. No torch."""

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_spin.report.results import Results
from megatron_spin.report.table import Table, comparison, times

if TYPE_CHECKING:
    from rich.console import Console


def print_table(console: "Console", table: Table, *, title: str) -> None:
    """The first column is aligned to the left and never wrapped, all others are aligned to the right."""
    from rich import box
    from rich.table import Table as RichTable

    rich = RichTable(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=0)
    first, *others = table.titles
    rich.add_column(first, no_wrap=True)
    for name in others:
        rich.add_column(name, justify="right")
    for row in table.rows:
        rich.add_row(*row)
    console.print(rich)
    for note in table.notes:
        console.print(note, soft_wrap=True, highlight=False, style="dim")


def print_report(results: Results, *, picture: Path, text: Path, samples: Path | None = None) -> None:
    """The comparison, the times, and where to find more."""
    from rich.console import Console

    console = Console()
    if results.evaluated:
        print_table(console, comparison(results, narrow=True), title=results.config.name)
    print_table(console, times(results), title=f"where the time went: {results.seconds / 60:.1f} minutes")
    lines = [
        f"tensorboard  tensorboard --logdir {results.root}",
        f"plot         {picture}",
        f"report       {text}",
    ]
    if samples is not None:
        lines.append(f"samples      {samples}")
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
