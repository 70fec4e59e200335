"""``tools/report.py``."""

from pathlib import Path

from megatron_spin import cli
from megatron_spin.errors import ConfigError


def main() -> None:
    """Shows what a run measured."""
    parser = cli.Parser(
        description="Show what a run measured: a table on the terminal, and in the run directory report.md, report.png "
        "and samples.md, where all models' answers to the same prompts are side by side. Works on an unfinished run, "
        "too."
    )
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

    from megatron_spin.io import atomic_writer
    from megatron_spin.report.plot import plot
    from megatron_spin.report.results import read_results
    from megatron_spin.report.side_by_side import Decoding, read_shown, samples_markdown
    from megatron_spin.report.table import report_markdown
    from megatron_spin.report.terminal import print_report

    results = read_results(arguments.run_dir)
    picture, text = arguments.run_dir / "report.png", arguments.run_dir / "report.md"
    plot(results, picture)
    with atomic_writer(text) as file:
        file.write(report_markdown(results, picture=picture))
    page = None
    if arguments.samples and results.evaluated:
        decoding: Decoding = "greedy" if arguments.greedy else "sampled"
        shown = read_shown(results.root, count=arguments.samples, decoding=decoding)
        page = results.root / "samples.md"
        with atomic_writer(page) as file:
            file.write(samples_markdown(shown, name=results.config.name, decoding=decoding))
    print_report(results, picture=picture, text=text, samples=page)
