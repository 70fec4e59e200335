"""The picture of a run: training curves above, what was measured on held-out prompts below. No torch."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_spin.io import atomic_writer
from megatron_spin.report.results import Evaluated, Results
from megatron_spin.spin.objective import objective_class

INK, FAINT, BAND = "#2b2f36", "#8a919c", "#f3f5f8"
SPIN, SPIN_LIGHT, BASELINE, BASELINE_LIGHT, WARM = "#1f6f8b", "#9cc7d6", "#8a919c", "#c9ced6", "#d1603d"
STYLE: Any = {
    "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.edgecolor": FAINT,
    "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": "#e3e6eb", "grid.linewidth": 0.7, "axes.axisbelow": True,
    "legend.frameon": False, "legend.fontsize": 8,
}  # fmt: skip

Panel = Callable[[Any, Results], None]
"""Draws into one pair of axes."""


def plot(results: Results, path: Path) -> None:
    """Writes the picture as PNG, whole or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves, measured = _curve_panels(results), _measured_panels(results)
    rows = [row for row in (curves, measured) if row]
    with pyplot.rc_context(STYLE):
        width = max(len(row) for row in rows)
        figure, axes = pyplot.subplots(
            len(rows), width, figsize=(4.0 * width, 3.1 * len(rows)), squeeze=False, layout="constrained"
        )
        for line, panels in zip(axes, rows, strict=True):
            for place, panel in zip(line, panels, strict=False):
                panel(place, results)
            for place in line[len(panels) :]:
                place.set_axis_off()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
        pyplot.close(figure)
    with atomic_writer(path, "wb") as file:
        file.write(_small(buffer))


def _small(picture: io.BytesIO) -> bytes:
    """The PNG in 128 colors, which look the same and take a third; without metadata, so that the same run gives the same bytes."""
    from PIL import Image  # matplotlib needs it, too

    out = io.BytesIO()
    Image.open(picture).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(out, format="PNG", optimize=True)
    return out.getvalue()


# ------------------------------------------------------------------------------------------------------------------ training


def _curve_panels(results: Results) -> list[Panel]:
    if not results.curves:
        return []
    if not objective_class(results.config).compares():
        return [_loss]
    return [_loss, _accuracy, _rewards]


def _points(results: Results, key: str) -> list[tuple[list[int], list[float]]]:
    """Steps counted through all iterations and the values of ``key``, for each iteration."""
    points, before = [], 0
    for curve in results.curves:
        rows = [row for row in curve if row.get(key) is not None]
        points.append(([before + row["step"] for row in rows], [float(row[key]) for row in rows]))
        before += curve[-1]["step"]
    return points


def _smooth(values: Sequence[float]) -> list[float]:
    """A running mean over a tenth of an iteration, to see the course through the noise of batches."""
    half = max(1, len(values) // 20)
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _curve(place: Any, results: Results, key: str, *, color: str, label: str | None = None) -> None:
    for number, (steps, values) in enumerate(_points(results, key)):
        place.plot(steps, values, color=color, alpha=0.28, linewidth=0.9)
        place.plot(steps, _smooth(values), color=color, linewidth=1.9, label=None if number else label)


def _iterations(place: Any, results: Results) -> None:
    """Every other iteration on a band, each with its name above."""
    before = 0
    title = objective_class(results.config).title
    for number, curve in enumerate(results.curves):
        after = before + curve[-1]["step"]
        if number % 2:
            place.axvspan(before + 0.5, after + 0.5, color=BAND, zorder=0)
        if len(results.curves) > 1:
            place.annotate(
                title(number), ((before + after) / 2 + 0.5, 1), xycoords=("data", "axes fraction"), xytext=(0, -2),
                textcoords="offset points", ha="center", va="top", fontsize=8, color=FAINT,
            )  # fmt: skip
        before = after
    place.set_xlim(0.5, before + 0.5)
    place.set_xlabel("optimizer step")


def _loss(place: Any, results: Results) -> None:
    _curve(place, results, "loss", color=SPIN)
    place.set_title("training loss")
    _iterations(place, results)


def _accuracy(place: Any, results: Results) -> None:
    _curve(place, results, "accuracy", color=SPIN)
    place.axhline(0.5, color=FAINT, linewidth=0.9, linestyle=":")
    place.set_title("pairs with a margin above 0 (equal ones have 0)")
    place.yaxis.set_major_formatter(_percent_ticks())
    _iterations(place, results)


def _rewards(place: Any, results: Results) -> None:
    _curve(place, results, "real_reward", color=SPIN, label="real answers")
    _curve(
        place,
        results,
        "generated_reward",
        color=WARM,
        label="the opponent's" if objective_class(results.config).generates else "rejected answers",
    )
    place.axhline(0, color=FAINT, linewidth=0.9, linestyle=":")
    place.set_title("reward: β x log-ratio to the opponent")
    place.legend(loc="best")
    _iterations(place, results)


# ------------------------------------------------------------------------------------------------------------------ measured


def _measured_panels(results: Results) -> list[Panel]:
    """Up to three panels, of what this run has to show."""
    models = results.evaluated
    if not models:
        return []
    panels: list[Panel] = []
    if any(model.values.get("exact_match_sampled") or model.values.get("exact_match_greedy") for model in models):
        panels.append(_exact_match)
    if results.config.evaluation.patterns:
        panels.append(_patterns)
    panels += [_nll, _length, _truncated]
    return panels[:3]


def _names(models: Sequence[Evaluated]) -> list[str]:
    return [model.name.removesuffix(" steps") for model in models]


def _colors(models: Sequence[Evaluated]) -> list[str]:
    return [BASELINE if model.iteration is None else SPIN for model in models]


def _bars(
    place: Any,
    models: Sequence[Evaluated],
    values: Sequence[float | None],
    *,
    digits: str,
    errors: Sequence[float | None] | None = None,
) -> None:
    """One bar a model, with its number above."""
    heights = [0.0 if value is None else value for value in values]
    place.bar(range(len(models)), heights, color=_colors(models), width=0.66)
    if errors is not None:
        spread = [error or 0.0 for error in errors]
        place.errorbar(range(len(models)), heights, yerr=spread, fmt="none", ecolor=INK, elinewidth=0.9)
    for i, height in enumerate(heights):
        above = (errors[i] or 0.0) if errors is not None else 0.0
        place.annotate(
            format(height, digits),
            (i, height + above),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=8,
        )
    place.set_xticks(
        range(len(models)),
        _names(models),
        rotation=20 if len(models) > 3 else 0,
        ha="right" if len(models) > 3 else "center",
    )
    place.margins(y=0.15)


def _exact_match(place: Any, results: Results) -> None:
    models = results.evaluated
    for i, model in enumerate(models):
        spin = model.iteration is not None
        shown = (
            ("exact_match_sampled", SPIN if spin else BASELINE),
            ("exact_match_greedy", SPIN_LIGHT if spin else BASELINE_LIGHT),
        )
        for side, (key, color) in zip((-0.2, 0.2), shown, strict=True):
            value = model.values.get(key) or 0.0
            place.bar(i + side, value, width=0.38, color=color)
            place.annotate(
                f"{value:.0%}",
                (i + side, value),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=7,
            )
    place.set_xticks(range(len(models)), _names(models), rotation=20, ha="right")
    place.yaxis.set_major_formatter(_percent_ticks())
    place.set_title("exact match: sampled (dark), greedy (light)")
    place.margins(y=0.12)


def _patterns(place: Any, results: Results) -> None:
    models, patterns = results.evaluated, list(results.config.evaluation.patterns)
    lines = (WARM, SPIN, INK, FAINT)
    for number, name in enumerate(patterns):
        color = lines[number % len(lines)]
        shares = [model.values.get("patterns", {}).get(name, {}).get("sampled") or 0.0 for model in models]
        if len(patterns) == 1:
            _bars(place, models, shares, digits=".1%")
        else:
            place.plot(range(len(models)), shares, marker="o", color=color, label=name)
        if name in results.data_patterns:
            share = results.data_patterns[name]
            place.axhline(
                share, color=color, linewidth=1.2, linestyle="--", label=f"{name} in the training data: {share:.0%}"
            )
    if len(patterns) > 1:
        place.set_xticks(range(len(models)), _names(models), rotation=20, ha="right")
    place.yaxis.set_major_formatter(_percent_ticks())
    place.set_title(f"answers with “{patterns[0]}”" if len(patterns) == 1 else "share of answers by pattern")
    place.legend(loc="upper right")


def _nll(place: Any, results: Results) -> None:
    values = [model.values.get("nll_per_token") for model in results.evaluated]
    errors = [model.values.get("nll_per_token_error") for model in results.evaluated]
    _bars(
        place,
        results.evaluated,
        values,
        digits=".4f" if max((value or 0.0) for value in values) < 0.1 else ".3f",
        errors=errors,
    )
    place.set_title("NLL of held-out answers, nats a token")


def _length(place: Any, results: Results) -> None:
    _bars(
        place,
        results.evaluated,
        [model.values.get("mean_response_tokens") for model in results.evaluated],
        digits=".0f",
    )
    real = results.evaluated[0].values.get("mean_real_tokens")
    if real is not None:
        place.axhline(real, color=WARM, linewidth=1.2, linestyle="--", label=f"real answers: {real:.0f}")
        place.legend(loc="upper right")
    place.set_title("tokens of a sampled answer")


def _truncated(place: Any, results: Results) -> None:
    _bars(
        place, results.evaluated, [model.values.get("truncated_fraction") for model in results.evaluated], digits=".1%"
    )
    place.yaxis.set_major_formatter(_percent_ticks())
    place.set_title("sampled answers that did not end")


def _percent_ticks() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1.0, decimals=0)
