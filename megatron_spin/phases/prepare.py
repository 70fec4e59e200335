"""The prepare phase: writes and reports what :mod:`megatron_spin.data.preparation` prepares. No torch."""

from typing import Any

from megatron_spin.config import Config
from megatron_spin.data.manifest import DataManifest
from megatron_spin.data.pairs import TWO_ANSWERS, save_pairs
from megatron_spin.data.preparation import prepare
from megatron_spin.data.tokenization import dropped_words
from megatron_spin.log import logger
from megatron_spin.run.directory import RunDir


class Prepare:
    """The phase: bad input is refused before the run directory exists, since a mistyped path must not bind it."""

    def __init__(self, config: Config, run_dir: RunDir) -> None:
        self.config = config
        self.run_dir = run_dir

    def check(self) -> None:
        """Does all but writing. Raises as :func:`megatron_spin.data.preparation.prepare`."""
        self._prepared = prepare(self.config)

    def run(self) -> dict[str, Any]:
        prepared, manifest = self._prepared, self._prepared.manifest
        prepared.save(self.run_dir.data)
        if prepared.pairs is not None:  # the pairs are given; their opponent is the model that the run starts from
            from megatron_spin.phases.opponent import read_opponent  # here, not above: it imports torch

            opponent = read_opponent(self.config, self.run_dir, 0)
            save_pairs(
                self.run_dir.target(iteration=0).pairs,
                prepared.pairs,
                answers=TWO_ANSWERS,
                opponent=opponent.identity,
                data=manifest.identity,
            )
        logger.info(f"counts of the data:\n{counts_table(manifest, self.config)}")
        return {"identity": manifest.identity, "prompts": manifest.counts["kept"]}


def counts_table(manifest: DataManifest, config: Config) -> str:
    """The counts of the data, one line per count."""
    counts, eval_counts = manifest.counts, manifest.eval_counts
    lines = [("rows read", counts["read"])]
    for reason, count in counts["dropped"].items():
        lines.append((f"  dropped: {dropped_words(reason, config)}", count))
    if counts["held_out"]:
        lines.append(("  held out for evaluation", counts["held_out"]))
    not_drawn = counts["read"] - sum(counts["dropped"].values()) - counts["held_out"] - counts["kept"]
    if not_drawn:
        lines.append((f"  not drawn (data.num_prompts={config.data.num_prompts})", not_drawn))
    lines.append(("prompts to train on", counts["kept"]))
    for part, count in counts["tokens"].items():
        lines.append((f"  {part} tokens", count))
    lines.append(("usable rows whose answer was cut", counts["capped"]))
    lines.append(("usable rows whose prompt came before", counts["duplicates"]))
    if "pairs" in counts:
        pairs = counts["pairs"]
        lines.append(("rejected answers that were cut", pairs["truncated"]))
        lines.append(("pairs of equal answers", pairs["identical"]))
        if pairs["dropped"]:
            lines.append(("pairs left out (generation.truncated=drop)", pairs["dropped"]))
    if "read" in eval_counts:
        lines.append(("evaluation rows read", eval_counts["read"]))
        for reason, count in eval_counts["dropped"].items():
            lines.append((f"  dropped: {dropped_words(reason, config)}", count))
    lines.append(("prompts to evaluate on", eval_counts["kept"]))
    if "with_rejected" in eval_counts:
        lines.append(("  of these with a rejected answer", eval_counts["with_rejected"]))
    if eval_counts["prompts_also_trained_on"]:
        lines.append(("  of these also trained on", eval_counts["prompts_also_trained_on"]))
    for name, part in manifest.likelihood.items():
        lines.append((f"answers of {name} for their NLL alone", part["kept"]))
    width = max(len(text) for text, _ in lines)
    return "\n".join(f"{text:<{width}}  {count:>12,}" for text, count in lines)
