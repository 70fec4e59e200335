"""Writes what a run measured, and on what machine, between the markers of Markdown files.

No figure there is typed by hand.
"""

import os
import shutil
from pathlib import Path

from megatron_spin import cli
from megatron_spin.errors import RunDirError
from megatron_spin.io import atomic_writer
from megatron_spin.report.results import Results, read_results
from megatron_spin.report.table import Table, comparison, markdown
from megatron_spin.run.directory import RunDir
from megatron_spin.run.result import num_played

OVERVIEW = ("exact match, sampled", "greedy", "NLL/token", "beats opponent")
"""Titles of the columns that a README shows, besides the models' names and the run's first pattern: six at most."""


def main() -> None:
    parser = cli.Parser(description=__doc__)
    parser.add_argument(
        "run_dir",
        type=Path,
        metavar="RUN_DIR",
        help="run directory, on the machine that made it, after tools/report.py",
    )
    parser.add_argument("--readme", type=Path, metavar="FILE", help="file that gets a table of at most six columns")
    parser.add_argument("--page", type=Path, metavar="FILE", help="file that gets every column and where the time went")
    parser.add_argument("--picture", type=Path, required=True, metavar="FILE", help="where report.png is copied")
    arguments = cli.parse(parser)
    report = arguments.run_dir / "report.png"
    if not report.exists():
        raise RunDirError(f"{report} is missing: run tools/report.py {arguments.run_dir} first")

    results = read_results(arguments.run_dir)
    texts = {}
    for path, short in ((arguments.readme, True), (arguments.page, False)):
        if path is not None:
            texts[path] = replace_block(path, run_block(results, picture=arguments.picture, page=path, short=short))
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(report, arguments.picture)
    for path, text in texts.items():
        with atomic_writer(path) as file:
            file.write(text)
        print(f"{path}: the block of {arguments.run_dir}; {arguments.picture}: its picture")


def run_block(results: Results, *, picture: Path, page: Path, short: bool = False) -> str:
    """Markdown of what ``results`` hold, with the picture's path relative to ``page``.

    Args:
        short: the columns of :data:`OVERVIEW` and no more, for a README.

    Raises:
        RunDirError: the run has evaluated nothing yet, or has not finished.
    """
    expected = 1 + len(results.config.baselines) + num_played(results.config, RunDir(results.root))
    if not results.evaluated or len(results.evaluated) < expected:
        raise RunDirError(
            f"{results.root} has not finished, so its figures would be incomplete: "
            "run the same tools/spin.sh command again"
        )
    table = comparison(results)
    machines = f" on {'; '.join(results.machines)}" if results.machines else ""
    measured = f"Measured {results.finished[:10]}{machines}. The run took {results.seconds / 60:.1f} minutes"
    if short:
        titles = [*OVERVIEW, *list(results.config.evaluation.patterns)[:1]]
        table = overview(table, titles, notes=[*table.notes[:1], *results.notes])  # how much was measured; the result
        time = "."
    else:
        kinds = [f"{phase.name} {phase.seconds:.0f} s" for phase in results.by_kind() if phase.seconds >= 1]
        time = f": {', '.join(kinds)}."
    path = os.path.relpath(picture, page.parent)
    return "\n\n".join([markdown(table), f"![training curves and what was measured]({path})", measured + time])


def overview(table: Table, titles: list[str], *, notes: list[str]) -> Table:
    """The first column of ``table`` and those called one of ``titles``."""
    kept = [0] + [i for i, title in enumerate(table.titles) if title in titles]
    rows = [[row[i] for i in kept] for row in table.rows]
    return Table([table.titles[i] for i in kept], rows, notes)


def replace_block(path: Path, block: str, *, name: str = "run") -> str:
    """The text of ``path`` with ``block`` between the markers of ``name``.

    Raises:
        RunDirError: the file is missing, or does not have each marker once, in order.
    """
    begin, end = markers(name)
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise RunDirError(f"{path} does not exist: give the file that has {begin} and {end}") from None
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise RunDirError(f"{path} must have {begin} and after it {end}, once each: put them where the figures belong")
    return f"{text[: text.index(begin)]}{begin}\n{block}\n{text[text.index(end) :]}"


def markers(name: str) -> tuple[str, str]:
    """The comments between which the figures of ``name`` stand."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


if __name__ == "__main__":
    cli.run(main)
