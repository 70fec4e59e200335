"""Colors and matplotlib settings of every picture: a run's, the experiments' and the theory's. No torch."""

from typing import Any

INK, FAINT, BAND, GRID = "#2b2f36", "#8a919c", "#f3f5f8", "#e3e6eb"
SPIN, SPIN_LIGHT = "#1f6f8b", "#9cc7d6"
BASELINE, BASELINE_LIGHT = FAINT, "#c9ced6"
WARM = "#d1603d"

STYLE: dict[str, Any] = {
    "font.size": 9,
    "text.color": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
"""For ``matplotlib.rc_context``."""
