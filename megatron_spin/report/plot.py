"""The picture of a run: training curves above, what was measured on held-out prompts below. No torch."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_spin.io import atomic_writer
from megatron_spin.report.results import Evaluated, Results
from megatron_spin.report.style import (
    BAND,
    BASELINE,
    BASELINE_LIGHT,
    FAINT,
    INK,
    SPIN,
    SPIN_LIGHT,
    STYLE,
    WARM,
)
from megatron_spin.spin.objective import objective_class

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Panel = Callable[[Any, Results], None]
"""Draws into one pair of axes."""


def plot(results: Results, path: Path) -> None:
    """Writes the picture as PNG, whole or not at all."""
    picture = encode(draw(results))
    with atomic_writer(path, "wb") as file:
        file.write(picture)


def draw(results: Results) -> "Figure":
    """The figure: a row of training curves and a row of measures, as far as the run has them."""
    import matplotlib
    from matplotlib.figure import Figure

    # Figure itself, not pyplot: pyplot keeps every figure it makes and chooses a backend for the whole process.
    rows = [panels for panels in (_curve_panels(results), _measured_panels(results)) if panels]
    width = max(len(panels) for panels in rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.0 * width, 3.1 * len(rows)), layout="constrained")
        axes = figure.subplots(len(rows), width, squeeze=False)
        for axes_of_row, panels in zip(axes, rows, strict=True):
            for ax, panel in zip(axes_of_row, panels, strict=False):
                panel(ax, results)
            for ax in axes_of_row[len(panels) :]:
                ax.set_axis_off()
    return figure


def encode(figure: "Figure") -> bytes:
    """PNG in 128 colors, which look the same and take a third of the space; without metadata.

    The same run gives the same bytes.
    """
    from PIL import Image  # a dependency of matplotlib

    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", dpi=110)
    image = Image.open(full).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    image.save(small, format="PNG", optimize=True)
    return small.getvalue()


# ---------------------------------------------------------------------------------------------------- training


def _curve_panels(results: Results) -> list[Panel]:
    """Those of the quantities that the objective reports."""
    reported = set()
    for curve in results.curves:
        for row in curve:
            reported |= {name for name, value in row.values.items() if value is not None}
    panels = {"loss": _loss, "accuracy": _accuracy, "real_reward": _rewards}
    return [panel for name, panel in panels.items() if name in reported]


def _points(results: Results, key: str) -> list[tuple[list[int], list[float]]]:
    """For each iteration, steps counted through all iterations, and the values of ``key``."""
    points = []
    before = 0
    for curve in results.curves:
        steps, values = [], []
        for row in curve:
            value = row.values.get(key)
            if value is not None:
                steps.append(before + row.step)
                values.append(value)
        points.append((steps, values))
        before += curve[-1].step
    return points


def _smooth(values: Sequence[float]) -> list[float]:
    """A running mean over a tenth of an iteration, which shows the trend through the noise of batches."""
    half = max(1, len(values) // 20)
    means = []
    for i in range(len(values)):
        window = values[max(0, i - half) : i + half + 1]
        means.append(sum(window) / len(window))
    return means


def _curve(ax: Any, results: Results, key: str, *, color: str, label: str | None = None) -> None:
    for steps, values in _points(results, key):
        ax.plot(steps, values, color=color, alpha=0.28, linewidth=0.9)
        ax.plot(steps, _smooth(values), color=color, linewidth=1.9, label=label)
        label = None  # one entry of the legend for all iterations


def _mark_iterations(ax: Any, results: Results) -> None:
    """Puts every other iteration on a band, with the name of each at the top."""
    before = 0
    title = objective_class(results.config).title
    for number, curve in enumerate(results.curves):
        after = before + curve[-1].step
        if number % 2:
            ax.axvspan(before + 0.5, after + 0.5, color=BAND, zorder=0)
        if len(results.curves) > 1:
            ax.annotate(
                title(number),
                ((before + after) / 2 + 0.5, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, -2),
                textcoords="offset points",
                ha="center",
                va="top",
                fontsize=8,
                color=FAINT,
            )
        before = after
    ax.set_xlim(0.5, before + 0.5)
    ax.set_xlabel("optimizer step")


def _loss(ax: Any, results: Results) -> None:
    _curve(ax, results, "loss", color=SPIN)
    ax.set_title("training loss")
    _mark_iterations(ax, results)


def _accuracy(ax: Any, results: Results) -> None:
    _curve(ax, results, "accuracy", color=SPIN)
    ax.axhline(0.5, color=FAINT, linewidth=0.9, linestyle=":")
    ax.set_title("pairs with a margin above 0 (equal ones have 0)")
    ax.yaxis.set_major_formatter(_percent_ticks())
    _mark_iterations(ax, results)


def _rewards(ax: Any, results: Results) -> None:
    other = "the opponent's" if objective_class(results.config).generates else "rejected answers"
    _curve(ax, results, "real_reward", color=SPIN, label="real answers")
    _curve(ax, results, "generated_reward", color=WARM, label=other)
    ax.axhline(0, color=FAINT, linewidth=0.9, linestyle=":")
    ax.set_title("reward: β x log-ratio to the opponent")
    ax.legend(loc="best")
    _mark_iterations(ax, results)


# ---------------------------------------------------------------------------------------------------- measured


def _measured_panels(results: Results) -> list[Panel]:
    """Up to three panels, of what this run has to show."""
    if not results.evaluated:
        return []
    panels: list[Panel] = []
    answers = [model.evaluation.answers for model in results.evaluated]
    if any(measures.exact_match_sampled.value or measures.exact_match_greedy.value for measures in answers):
        panels.append(_exact_match)
    if results.config.evaluation.patterns:
        panels.append(_patterns)
    panels += [_nll, _length, _truncated]
    return panels[:3]


def _name_ticks(ax: Any, models: Sequence[Evaluated], *, slanted: bool = True) -> None:
    names = [model.name.removesuffix(" steps") for model in models]
    ax.set_xticks(range(len(models)), names, rotation=20 if slanted else 0, ha="right" if slanted else "center")


def _write_above(ax: Any, text: str, x: float, y: float, *, fontsize: int = 8) -> None:
    ax.annotate(text, (x, y), xytext=(0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=fontsize)


def _bars(
    ax: Any,
    models: Sequence[Evaluated],
    values: Sequence[float | None],
    *,
    digits: str,
    errors: Sequence[float | None] | None = None,
) -> None:
    """One bar per model, with its number above."""
    heights = [value or 0.0 for value in values]
    spreads = [0.0] * len(models)
    colors = [BASELINE if model.iteration is None else SPIN for model in models]
    ax.bar(range(len(models)), heights, color=colors, width=0.66)
    if errors is not None:
        spreads = [error or 0.0 for error in errors]
        ax.errorbar(range(len(models)), heights, yerr=spreads, fmt="none", ecolor=INK, elinewidth=0.9)
    for i, (height, spread) in enumerate(zip(heights, spreads, strict=True)):
        _write_above(ax, format(height, digits), i, height + spread)
    _name_ticks(ax, models, slanted=len(models) > 3)
    ax.margins(y=0.15)


def _exact_match(ax: Any, results: Results) -> None:
    for i, model in enumerate(results.evaluated):
        dark, light = (BASELINE, BASELINE_LIGHT) if model.iteration is None else (SPIN, SPIN_LIGHT)
        answers = model.evaluation.answers
        for x, measure, color in (
            (i - 0.2, answers.exact_match_sampled, dark),
            (i + 0.2, answers.exact_match_greedy, light),
        ):
            height = measure.value or 0.0
            ax.bar(x, height, width=0.38, color=color)
            _write_above(ax, f"{height:.0%}", x, height, fontsize=7)
    _name_ticks(ax, results.evaluated)
    ax.yaxis.set_major_formatter(_percent_ticks())
    ax.set_title("exact match: sampled (dark), greedy (light)")
    ax.margins(y=0.12)


def _patterns(ax: Any, results: Results) -> None:
    models, patterns = results.evaluated, list(results.config.evaluation.patterns)
    colors = (WARM, SPIN, INK, FAINT)
    for number, name in enumerate(patterns):
        color = colors[number % len(colors)]
        shares = [model.pattern_share(name) or 0.0 for model in models]
        if len(patterns) == 1:
            _bars(ax, models, shares, digits=".1%")
        else:
            ax.plot(range(len(models)), shares, marker="o", color=color, label=name)
        if name in results.data_patterns:
            share = results.data_patterns[name]
            label = f"{name} in the training data: {share:.0%}"
            ax.axhline(share, color=color, linewidth=1.2, linestyle="--", label=label)
    if len(patterns) > 1:
        _name_ticks(ax, models)
    ax.yaxis.set_major_formatter(_percent_ticks())
    ax.set_title(f"answers with “{patterns[0]}”" if len(patterns) == 1 else "share of answers by pattern")
    ax.legend(loc="upper right")


def _nll(ax: Any, results: Results) -> None:
    measures = [model.evaluation.logps.nll_per_token for model in results.evaluated]
    values = [measure.value for measure in measures]
    digits = ".4f" if max(value or 0.0 for value in values) < 0.1 else ".3f"
    _bars(ax, results.evaluated, values, digits=digits, errors=[measure.error for measure in measures])
    ax.set_title("NLL of held-out answers, nats per token")


def _length(ax: Any, results: Results) -> None:
    answers = [model.evaluation.answers for model in results.evaluated]
    _bars(ax, results.evaluated, [measures.mean_response_tokens for measures in answers], digits=".0f")
    real = answers[0].mean_real_tokens
    if real is not None:
        ax.axhline(real, color=WARM, linewidth=1.2, linestyle="--", label=f"real answers: {real:.0f}")
        ax.legend(loc="upper right")
    ax.set_title("tokens of a sampled answer")


def _truncated(ax: Any, results: Results) -> None:
    answers = [model.evaluation.answers for model in results.evaluated]
    _bars(ax, results.evaluated, [measures.truncated_fraction for measures in answers], digits=".1%")
    ax.yaxis.set_major_formatter(_percent_ticks())
    ax.set_title("sampled answers that did not end")


def _percent_ticks() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1.0, decimals=0)
