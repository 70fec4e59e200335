"""The prepare phase: what it says of the data that :mod:`megatron_spin.data.preparation` prepared. No torch."""

from typing import Any

from megatron_spin.config import Config
from megatron_spin.data.tokenization import dropped_words


def counts_table(manifest: dict[str, Any], config: Config) -> str:
    """The counts of the data's ``manifest.json``, one line per count."""
    counts, eval_counts = manifest["counts"], manifest["eval_counts"]
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
    for name, part in manifest["likelihood"].items():
        lines.append((f"answers of {name} for their NLL alone", part["kept"]))
    width = max(len(text) for text, _ in lines)
    return "\n".join(f"{text:<{width}}  {count:>12,}" for text, count in lines)
