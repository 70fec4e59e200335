"""The comparison as a table: for the terminal, for ``report.md`` and for the README. No torch."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_spin.report.results import Evaluated, Results

DASH = "–"  # noqa: RUF001  (what stands where a number does not apply)


@dataclasses.dataclass(frozen=True)
class Column:
    """One number of the comparison."""

    key: str
    title: str
    narrow: str
    """The title on a terminal, in two lines."""
    format: Callable[[float], str]
    meaning: str


def _percent(value: float) -> str:
    return f"{value:.1%}"


COLUMNS = (
    Column(
        "exact_match_sampled",
        "exact match, sampled",
        "match,\nsampled",
        _percent,
        "right answers among samples at temperature 1",
    ),
    Column("exact_match_greedy", "greedy", "match,\ngreedy", _percent, "right answers of greedy decoding"),
    Column(
        "nll_per_token",
        "NLL/token",
        "NLL a\ntoken",
        "{:.4f}".format,
        "negative log-likelihood of the held-out answers, nats a token",
    ),
    Column(
        "opponent_accuracy",
        "beats opponent",
        "beats\nopponent",
        _percent,
        "held-out pairs (real, sample of the opponent; DPO: given ones) won",
    ),
    Column(
        "identical_fraction",
        "same as real",
        "same as\nreal",
        _percent,
        "sampled answers equal to the real one, token for token",
    ),
    Column(
        "truncated_fraction", "not ended", "not\nended", _percent, "sampled answers that were cut before they ended"
    ),
    Column("mean_response_tokens", "tokens", "tokens", "{:.1f}".format, "mean length of a sampled answer"),
)


@dataclasses.dataclass(frozen=True)
class Table:
    """Titles and cells, all text."""

    titles: list[str]
    rows: list[list[str]]
    notes: list[str]


def comparison(results: Results, *, narrow: bool = False) -> Table:
    """A row for each model that was measured, then the data's own figures; columns that no model has a number for are left out.

    Args:
        narrow: for a terminal of 80 columns: titles in two lines, no standard errors.
    """
    models = [model.values for model in results.evaluated]
    columns = [column for column in COLUMNS if any(values.get(column.key) is not None for values in models)]
    patterns = list(results.config.evaluation.patterns)
    titles = ["", *(column.narrow if narrow else column.title for column in columns), *patterns]
    rows = [_row(model, columns, patterns, errors=not narrow) for model in results.evaluated]
    rows += _data_rows(results, columns, patterns) if models else []
    if not narrow:
        for title, cells in _more_columns(results):
            titles.append(title)
            rows = [[*row, cell] for row, cell in zip(rows, [*cells, *[DASH] * len(rows)], strict=False)]
    count = models[0]["num_prompts"] if models else 0
    samples = results.config.evaluation.samples
    notes = [
        f"{count} held-out prompts, {samples} {'sample' if samples == 1 else 'samples'} each; trained on {results.prompts} prompts."
    ]
    if any(values.get("opponent_accuracy") is not None for values in models):
        notes.append(
            "Beats opponent: share of held-out pairs with a margin above 0; a sample that equals the real answer has none."
        )
    notes += [
        f"“{name}”: share of answers in which `{results.config.evaluation.patterns[name]}` is found."
        for name in patterns
    ]
    if results.config.evaluation.answer_pattern is not None and patterns and not narrow:
        notes.append("Right without: exact match among the sampled answers in which the expression is not found.")
    notes += results.notes
    return Table(titles, rows, notes)


def _row(model: Evaluated, columns: Sequence[Column], patterns: Sequence[str], *, errors: bool) -> list[str]:
    shares = [model.values.get("patterns", {}).get(name, {}).get("sampled") for name in patterns]
    return [
        model.name,
        *(_cell(model.values, column, errors=errors) for column in columns),
        *(_share(share) for share in shares),
    ]


def _more_columns(results: Results) -> list[tuple[str, list[str]]]:
    """Title and a cell a model: exact match of the answers without each pattern, and the NLL of each further file."""
    evaluation, models = results.config.evaluation, [model.values for model in results.evaluated]
    columns = []
    for name in evaluation.patterns if evaluation.answer_pattern is not None else ():
        shares = [values.get("patterns", {}).get(name, {}).get("exact_match_without") for values in models]
        columns.append((f"right without {name}", [_share(share) for share in shares]))
    for name in evaluation.likelihood:
        found = [values.get("likelihood", {}).get(name, {}).get("nll_per_token") for values in models]
        columns.append((f"NLL/token, {name}", [DASH if value is None else f"{value:.4f}" for value in found]))
    return columns


def _cell(values: dict[str, Any], column: Column, *, errors: bool) -> str:
    value, error = values.get(column.key), values.get(f"{column.key}_error")
    if value is None:
        return DASH
    return column.format(value) + (f" ± {column.format(error)}" if errors and error is not None else "")


def _share(value: float | None) -> str:
    return DASH if value is None else _percent(value)


def _data_rows(results: Results, columns: Sequence[Column], patterns: Sequence[str]) -> list[list[str]]:
    """What the real answers themselves show: those trained on and those held out."""
    first = results.evaluated[0].values
    held = {"mean_response_tokens": first.get("mean_real_tokens")}
    lengths = [
        DASH if held.get(column.key) is None else column.format(float(held[column.key] or 0)) for column in columns
    ]
    rows = [
        ["held-out data", *lengths, *(_share(first.get("patterns", {}).get(name, {}).get("real")) for name in patterns)]
    ]
    if results.data_patterns:
        rows.append(
            ["training data", *(DASH for _ in columns), *(_share(results.data_patterns.get(name)) for name in patterns)]
        )
    return rows


def times(results: Results) -> Table:
    """Where the time went, by kind of phase, and how much memory the largest process of each took (the GPU's own not counted)."""
    total = results.seconds or 1.0
    kinds = results.by_kind()
    rows = [
        [phase.name, str(phase.count), f"{phase.seconds:.1f}", f"{phase.seconds / total:.0%}", _gib(phase.memory)]
        for phase in kinds
    ]
    largest = max((phase.memory for phase in kinds if phase.memory is not None), default=None)
    return Table(
        ["phase", "times", "seconds", "share", "peak GiB"],
        [*rows, ["all", "", f"{results.seconds:.1f}", "", _gib(largest)]],
        [],
    )


def _gib(memory: float | None) -> str:
    return DASH if memory is None else f"{memory:.1f}"


def markdown(table: Table) -> str:
    """The table in GitHub's Markdown, numbers to the right."""
    lines = [
        "| " + " | ".join(title or " " for title in table.titles) + " |",
        "|---" + "|---:" * (len(table.titles) - 1) + "|",
    ]
    lines += ["| " + " | ".join(cell or " " for cell in row) + " |" for row in table.rows]
    return "\n".join(lines) + "".join(f"\n\n{note}" for note in table.notes)


def report_markdown(results: Results, *, picture: Path) -> str:
    """The whole ``report.md``."""
    parts = [
        f"# {results.config.name}",
        markdown(comparison(results)),
        f"![training curves and results]({picture.name})",
    ]
    parts += ["## Where the time went", markdown(times(results)), "## Columns"]
    parts += ["\n".join(f"- **{column.title}**: {column.meaning}" for column in COLUMNS)]
    parts += [
        f"Finished {results.finished}. The number behind ± is the standard error over prompts."
        if results.finished
        else ""
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def print_report(results: Results, *, picture: Path, text: Path, samples: Path | None = None) -> None:
    """The comparison, the times and where more is to be seen, on the terminal."""
    from rich.console import Console

    console = Console()
    if results.evaluated:
        _print(console, comparison(results, narrow=True), title=results.config.name)
    _print(console, times(results), title=f"where the time went: {results.seconds / 60:.1f} minutes")
    console.print(f"tensorboard  tensorboard --logdir {results.root}", soft_wrap=True, highlight=False)
    console.print(f"plot         {picture}", soft_wrap=True, highlight=False)
    console.print(f"report       {text}", soft_wrap=True, highlight=False)
    if samples is not None:
        console.print(f"samples      {samples}", soft_wrap=True, highlight=False)


def _print(console: Any, table: Table, *, title: str) -> None:
    from rich import box
    from rich.table import Table as RichTable

    rich = RichTable(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=0)
    for i, name in enumerate(table.titles):
        rich.add_column(name, justify="right" if i else "left", no_wrap=not i)
    for row in table.rows:
        rich.add_row(*row)
    console.print(rich)
    for note in table.notes:
        console.print(note, soft_wrap=True, highlight=False, style="dim")
