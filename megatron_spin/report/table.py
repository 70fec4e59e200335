"""The comparison as a table of text: for the terminal, for ``report.md`` and for the README. No torch."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_spin.evaluation.record import Evaluation
from megatron_spin.report.results import Results

DASH = "–"  # noqa: RUF001
"""Stands for a number that does not apply."""


@dataclasses.dataclass(frozen=True)
class Column:
    """One number of the comparison."""

    key: str
    """Its key in ``eval.json``."""
    title: str
    narrow: str
    """The title on a terminal, in two lines."""
    format: Callable[[float], str]
    meaning: str


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _percent_or_dash(value: float | None) -> str:
    return DASH if value is None else _percent(value)


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
        "NLL per\ntoken",
        "{:.4f}".format,
        "negative log-likelihood of the held-out answers, nats per token",
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
    """A row per measured model, then the data's own figures. Columns that no model has a number for are left out.

    Args:
        narrow: for a terminal of 80 columns: titles in two lines, no standard errors.
    """
    columns = _columns(results)
    patterns = list(results.config.evaluation.patterns)
    titles = ["", *(column.narrow if narrow else column.title for column in columns), *patterns]
    rows = []
    for model in results.evaluated:
        cells = [_cell(model.evaluation, column, errors=not narrow) for column in columns]
        shares = [_percent_or_dash(model.pattern_share(name)) for name in patterns]
        rows.append([model.name, *cells, *shares])
    rows += _data_rows(results, columns, patterns)
    if not narrow:
        for title, cells in _more_columns(results):
            titles.append(title)
            cells += [DASH] * (len(rows) - len(cells))
            for row, cell in zip(rows, cells, strict=True):
                row.append(cell)
    return Table(titles, rows, _notes(results, columns, narrow=narrow))


def _columns(results: Results) -> list[Column]:
    """The columns for which a model has a number."""
    columns = []
    for column in COLUMNS:
        if any(model.evaluation.measure(column.key).value is not None for model in results.evaluated):
            columns.append(column)
    return columns


def _cell(evaluation: Evaluation, column: Column, *, errors: bool) -> str:
    measure = evaluation.measure(column.key)
    if measure.value is None:
        return DASH
    cell = column.format(measure.value)
    if errors and measure.error is not None:
        cell += f" ± {column.format(measure.error)}"
    return cell


def _data_rows(results: Results, columns: Sequence[Column], patterns: Sequence[str]) -> list[list[str]]:
    """What the real answers themselves show: those held out and those trained on."""
    if not results.evaluated:
        return []
    answers = results.evaluated[0].evaluation.answers
    held_out = ["held-out data"]
    for column in columns:
        is_length = column.key == "mean_response_tokens" and answers.mean_real_tokens is not None
        held_out.append(column.format(answers.mean_real_tokens or 0.0) if is_length else DASH)
    for name in patterns:
        held_out.append(_percent_or_dash(answers.patterns[name].real if name in answers.patterns else None))
    rows = [held_out]
    if results.data_patterns:
        shares = [_percent_or_dash(results.data_patterns.get(name)) for name in patterns]
        rows.append(["training data", *(DASH for _ in columns), *shares])
    return rows


def _more_columns(results: Results) -> list[tuple[str, list[str]]]:
    """Title and a cell per model: the exact match without each pattern, and the NLL of each further file."""
    config = results.config.evaluation
    columns = []
    if config.answer_pattern is not None:
        for name in config.patterns:
            cells = []
            for model in results.evaluated:
                measures = model.evaluation.answers.patterns.get(name)
                cells.append(_percent_or_dash(None if measures is None else measures.exact_match_without))
            columns.append((f"right without {name}", cells))
    for name in config.likelihood:
        cells = []
        for model in results.evaluated:
            nll = model.evaluation.logps.likelihood.get(name)
            cells.append(DASH if nll is None or nll.value is None else f"{nll.value:.4f}")
        columns.append((f"NLL/token, {name}", cells))
    return columns


def _notes(results: Results, columns: Sequence[Column], *, narrow: bool) -> list[str]:
    config = results.config.evaluation
    count = results.evaluated[0].evaluation.num_prompts if results.evaluated else 0
    samples = "1 sample" if config.samples == 1 else f"{config.samples} samples"
    notes = [f"{count} held-out prompts, {samples} each; trained on {results.prompts} prompts."]
    if any(column.key == "opponent_accuracy" for column in columns):
        notes.append(
            "Beats opponent: share of held-out pairs with a margin above 0; a sample that equals the real answer has "
            "none."
        )
    for name, pattern in config.patterns.items():
        notes.append(f"“{name}”: share of answers in which `{pattern}` is found.")
    if config.answer_pattern is not None and config.patterns and not narrow:
        notes.append("Right without: exact match among the sampled answers in which the expression is not found.")
    return notes + results.notes


def times(results: Results) -> Table:
    """Where the time went by kind of phase, and the memory of the largest process of each, without GPU memory."""
    total = results.seconds or 1.0
    kinds = results.by_kind()
    rows = []
    for phase in kinds:
        seconds, part = f"{phase.seconds:.1f}", f"{phase.seconds / total:.0%}"
        rows.append([phase.name, str(phase.count), seconds, part, _gib(phase.memory)])
    largest = max((phase.memory for phase in kinds if phase.memory is not None), default=None)
    rows.append(["all", "", f"{results.seconds:.1f}", "", _gib(largest)])
    return Table(["phase", "times", "seconds", "share", "peak GiB"], rows, [])


def _gib(memory: float | None) -> str:
    return DASH if memory is None else f"{memory:.1f}"


def markdown(table: Table) -> str:
    """The table in GitHub's Markdown; all columns but the first are aligned to the right."""
    lines = [_markdown_row(table.titles), "|---" + "|---:" * (len(table.titles) - 1) + "|"]
    lines += [_markdown_row(row) for row in table.rows]
    return "\n\n".join(["\n".join(lines), *table.notes])


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell or " " for cell in cells) + " |"


def report_markdown(results: Results, *, picture: Path) -> str:
    """The whole ``report.md``."""
    meanings = "\n".join(f"- **{column.title}**: {column.meaning}" for column in COLUMNS)
    parts = [
        f"# {results.config.name}",
        markdown(comparison(results)),
        f"![training curves and results]({picture.name})",
        "## Where the time went",
        markdown(times(results)),
        "## Columns",
        meanings,
    ]
    if results.finished:
        parts.append(f"Finished {results.finished}. The number behind ± is the standard error over prompts.")
    return "\n\n".join(parts) + "\n"
