"""Writes what a run measured, and on what machine, between the markers of a README, so that no figure there is typed by hand."""

import shutil
from pathlib import Path

from megatron_spin import cli


def main() -> None:
    parser = cli.Parser(description=__doc__)
    parser.add_argument(
        "run_dir",
        type=Path,
        metavar="RUN_DIR",
        help="run directory, on the machine that made it, after tools/report.py",
    )
    parser.add_argument(
        "--readme",
        type=Path,
        default=Path("README.md"),
        metavar="FILE",
        help="file with the markers (default: README.md)",
    )
    parser.add_argument(
        "--picture", type=Path, default=Path("docs/quickstart.png"), metavar="FILE", help="where report.png is copied"
    )
    arguments = cli.parse(parser)

    from megatron_spin.errors import RunDirError
    from megatron_spin.io import atomic_writer
    from megatron_spin.report.readme import replace_block, run_block
    from megatron_spin.report.results import read_results

    report = arguments.run_dir / "report.png"
    if not report.exists():
        raise RunDirError(f"{report} is missing: run tools/report.py {arguments.run_dir} first")
    block = run_block(read_results(arguments.run_dir), picture=arguments.picture, readme=arguments.readme)
    text = replace_block(arguments.readme, block)
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(report, arguments.picture)
    with atomic_writer(arguments.readme) as file:
        file.write(text)
    print(f"{arguments.readme}: the block of {arguments.run_dir}; {arguments.picture}: its picture")


if __name__ == "__main__":
    cli.run(main)
