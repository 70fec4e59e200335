"""Shows what a run measured: a table on the terminal, report.md and report.png in the run directory. Works on an unfinished run, too."""

from pathlib import Path

from megatron_spin import cli


def main() -> None:
    parser = cli.Parser(description=__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run directory of tools/spin.sh, for example runs/quickstart/spin")
    arguments = cli.parse(parser)

    from megatron_spin.report.results import read_results

    results = read_results(arguments.run_dir)

    from megatron_spin.report.plot import plot
    from megatron_spin.report.table import print_report, report_markdown
    from megatron_spin.run_dir import atomic_writer

    picture, text = arguments.run_dir / "report.png", arguments.run_dir / "report.md"
    plot(results, picture)
    with atomic_writer(text) as file:
        file.write(report_markdown(results, picture=picture))
    print_report(results, picture=picture, text=text)


if __name__ == "__main__":
    cli.run(main)
