"""Draws docs/concepts.png: how beta, steps and iterations decide where self-play ends.

    .venv/bin/python -m examples.experiments.theory [PICTURE.png]

Everything is exact, on two prompts with six answers each. The policies and the objective are those of
tests/unit/spin/test_theory.py.
"""

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor

from examples.experiments.enumeration import best_response, divergence, gradient_path, random_policy, sft_path
from megatron_spin.report.style import FAINT, INK, SPIN, STYLE, WARM

STEPS, ITERATIONS = 300, 8
COLORS = {0.1: WARM, 0.3: "#e0a458", 0.5: "#8a6fa8", 0.7: "#5b8c5a", 1.0: SPIN, 5.0: INK}
"""By beta."""


def within_one_iteration(ax: Any, opponent: Tensor, data: Tensor) -> None:
    """KL over gradient steps. The rate is divided by beta/2, so that all curves start with the same step as SFT's."""
    for beta in (0.1, 0.3, 1.0, 5.0):
        path = gradient_path(opponent, data, beta, rate=2 / beta, steps=STEPS)
        ax.plot(
            range(1, STEPS + 1),
            [divergence(data, policy) for policy in path[1:]],
            color=COLORS[beta],
            label=f"SPIN, beta {beta:g}",
        )
    sft = sft_path(opponent, data, rate=1.0, steps=STEPS)
    ax.plot(
        range(1, STEPS + 1),
        [divergence(data, policy) for policy in sft[1:]],
        color=FAINT,
        linestyle=":",
        label="SFT",
    )
    ax.set(
        xscale="log",
        yscale="log",
        ylim=(1e-3, 20),
        xlabel="gradient steps",
        ylabel="KL(data || policy), nats",
        title="within one iteration",
    )
    ax.legend()


def from_iteration_to_iteration(ax: Any, opponent: Tensor, data: Tensor) -> None:
    """KL after iterations that are minimised exactly, and (dashed) after iterations that stop after ten steps."""
    for beta in (0.3, 0.5, 0.7, 1.0, 5.0):
        policy, path = opponent, [divergence(data, opponent)]
        # At a small beta, the probabilities of exact policies soon leave fp64's range.
        for _ in range(ITERATIONS if beta > 0.3 else 3):
            policy = best_response(policy, data, beta)
            path.append(max(divergence(data, policy), 1e-9))
        ax.plot(path, color=COLORS[beta], marker="o", markersize=3, label=f"beta {beta:g}, minimised")
    policy, path = opponent, [divergence(data, opponent)]
    for _ in range(ITERATIONS):
        policy = gradient_path(policy, data, 0.1, rate=1 / 0.1, steps=10)[-1]
        path.append(divergence(data, policy))
    ax.plot(path, color=COLORS[0.1], linestyle="--", label="beta 0.1, 10 steps")
    ax.set(yscale="log", ylim=(1e-6, 20), xlabel="iteration", title="from iteration to iteration")
    ax.legend(loc="lower left")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", nargs="?", type=Path, default=Path("docs/concepts.png"))
    picture = parser.parse_args().picture

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    opponent, data = random_policy(2, 6, seed=1), random_policy(2, 6, seed=2)
    with pyplot.rc_context(STYLE | {"axes.grid.axis": "both"}):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(8.6, 3.4), layout="constrained")
        within_one_iteration(left, opponent, data)
        from_iteration_to_iteration(right, opponent, data)
        figure.savefig(picture, dpi=100, metadata={"Software": None})
    print(f"{picture}: written")


if __name__ == "__main__":
    main()
