"""Draws an experiment by iteration, as mean and spread over the seeds.

One panel has the share of careless answers, the other the accuracy of the careful ones.
"""

import argparse
import io
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples.experiments.experiment import Experiment, read_experiment
from examples.experiments.table import measured
from megatron_spin import cli
from megatron_spin.errors import RunDirError
from megatron_spin.evaluation.record import Evaluation, PatternMeasures
from megatron_spin.io import atomic_writer
from megatron_spin.report.style import FAINT, INK, SPIN, STYLE, WARM

COLORS = (SPIN, WARM, INK, FAINT, "#7a9e3d")
DATA_SHARE = 20.0
"""Percent of careless answers in the data of self-play (make_problems.py)."""
Value = Callable[[PatternMeasures], float | None]
PANELS: dict[str, Value] = {
    "careless answers, %": lambda careless: careless.sampled,
    "careful answers that are right, %": lambda careless: careless.exact_match_without,
}


def series(rows: dict[str, dict[int, Evaluation]], arm: str, value: Value) -> list[tuple[float, float]]:
    """Mean and standard deviation over the seeds, in percent: the model that ``arm`` starts from, each iteration."""
    labels = ["sft", *(str(t) for t in range(len(rows)) if f"{arm}/{t}" in rows)]
    points = []
    for label in labels:
        values = []
        for evaluation in rows[f"{arm}/{label}"].values():
            share = value(evaluation.answers.patterns["careless"])
            assert share is not None, "there are careless and careful answers in every arm"
            values.append(100 * share)
        points.append((statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0))
    return points


def draw(experiment: Experiment, rows: dict[str, dict[int, Evaluation]]) -> bytes:
    """The picture as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(1, len(PANELS), figsize=(8, 3.1), layout="constrained")
        for ax, (title, value) in zip(axes, PANELS.items(), strict=True):
            _panel(ax, {arm: series(rows, arm, value) for arm in experiment.arms if f"{arm}/sft" in rows})
            ax.set_title(title)
        axes[0].axhline(DATA_SHARE, color=FAINT, linewidth=1.2, linestyle="--", label="in the data")
        axes[0].legend()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
        pyplot.close(figure)
    return buffer.getvalue()


def _panel(ax: Any, arms: dict[str, list[tuple[float, float]]]) -> None:
    for color, (arm, points) in zip(COLORS, arms.items(), strict=False):
        means, spreads = [mean for mean, _ in points], [spread for _, spread in points]
        ax.errorbar(
            range(len(points)), means, yerr=spreads, color=color, marker="o", markersize=4, capsize=3, label=arm
        )
    longest = max(map(len, arms.values()))
    ax.set_xticks(range(longest), ["SFT", *(f"SPIN {t}" for t in range(longest - 1))])


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path, metavar="EXPERIMENT.yaml")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/experiments"),
        metavar="DIR",
        help="--out of run.py (default: %(default)s)",
    )
    parser.add_argument("--picture", type=Path, required=True, metavar="FILE.png")
    arguments = parser.parse_args()
    experiment = read_experiment(arguments.experiment)
    rows = measured(experiment, arguments.out)
    if not rows:
        raise RunDirError(
            f"{arguments.out} has no finished evaluation of {experiment.name}: run examples/experiments/run.py first"
        )
    picture = draw(experiment, rows)
    with atomic_writer(arguments.picture, "wb") as file:
        file.write(picture)
    print(arguments.picture)


if __name__ == "__main__":
    cli.run(main)
