"""Shows what a run measured: a table on the terminal, and in the run directory report.md, report.png and samples.md, where all models' answers to
the same prompts stand side by side. Works on an unfinished run, too."""

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_spin import cli
from megatron_spin.errors import ConfigError

if TYPE_CHECKING:
    from megatron_spin.report.results import Results
    from megatron_spin.report.side_by_side import Decoding


def main() -> None:
    parser = cli.Parser(description=__doc__)
    parser.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="run directory of tools/spin.sh, for example runs/quickstart/spin"
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=5,
        metavar="N",
        help="prompts in samples.md; 0 leaves it out (default: 5, at most 20)",
    )
    parser.add_argument(
        "--greedy", action="store_true", help="samples.md shows greedy answers, not those sampled at temperature 1"
    )
    arguments = cli.parse(parser)
    if arguments.samples < 0:
        raise ConfigError(f"--samples {arguments.samples} must be at least 0: it is a number of prompts")

    from megatron_spin.report.results import read_results

    results = read_results(arguments.run_dir)

    from megatron_spin.io import atomic_writer
    from megatron_spin.report.plot import plot
    from megatron_spin.report.table import report_markdown
    from megatron_spin.report.terminal import print_report

    picture, text = arguments.run_dir / "report.png", arguments.run_dir / "report.md"
    plot(results, picture)
    with atomic_writer(text) as file:
        file.write(report_markdown(results, picture=picture))
    page = write_samples(results, arguments.samples, "greedy" if arguments.greedy else "sampled")
    print_report(results, picture=picture, text=text, samples=page)


def write_samples(results: "Results", count: int, decoding: "Decoding") -> Path | None:
    """Writes samples.md beside the report; None where it is not wanted or no model has answered anything yet."""
    from megatron_spin.io import atomic_writer
    from megatron_spin.report.side_by_side import read_shown, samples_markdown

    if not count or not results.evaluated:
        return None
    shown = read_shown(results.root, count=count, decoding=decoding)
    page = results.root / "samples.md"
    with atomic_writer(page) as file:
        file.write(samples_markdown(shown, name=results.config.name, decoding=decoding))
    return page


if __name__ == "__main__":
    cli.run(main)
