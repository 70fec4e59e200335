"""What a probe found: the differences between real and generated answers, and whether a few steps on some of them win the others. No torch."""

import dataclasses
import math
from pathlib import Path

from megatron_spin.config import load_config
from megatron_spin.data.pairs import load_pairs
from megatron_spin.data.templates import load_tokenizer
from megatron_spin.evaluation.differences import Differences, Phrase, differences
from megatron_spin.evaluation.metrics import Answer
from megatron_spin.io import read_json
from megatron_spin.run.directory import RunDir


@dataclasses.dataclass(frozen=True)
class Probe:
    """All that a probe tells."""

    differences: Differences
    steps: int
    """Optimizer steps after which held-out pairs were judged."""
    held_out: int
    """Held-out pairs."""
    accuracy: float | None
    """Share of them that the policy won (margin > 0), equal ones left out; None where all are equal."""
    accuracy_error: float | None
    """Its standard error."""
    ties: float
    """Share of them whose two answers are equal."""


def probe(run_dir: RunDir) -> Probe:
    """Reads a finished probe.

    Raises:
        RunDirError: a phase of it has not run.
    """
    config = load_config(run_dir.config)
    pairs, _ = load_pairs(run_dir.target(iteration=0).pairs)
    tokenizer = load_tokenizer(Path(config.model.hf))
    end = read_json(run_dir.data / "manifest.json")["end_token_id"]

    def answers(ids: list[list[int]]) -> list[Answer]:
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [Answer(item, str(text), item[-1] != end) for item, text in zip(ids, texts, strict=True)]

    found = differences(answers([pair.real_ids for pair in pairs]), answers([pair.generated_ids for pair in pairs]))
    evaluation = read_json(run_dir.target(iteration=0).eval)
    count, ties = evaluation["num_prompts"], evaluation["opponent_ties"]
    decided = round(count * (1 - ties))
    accuracy = evaluation["opponent_accuracy"] * count / decided if decided else None
    error = math.sqrt(accuracy * (1 - accuracy) / decided) if accuracy is not None else None
    steps = read_json(run_dir.state)["phases"]["train:0"]["steps"]
    return Probe(found, steps, count, accuracy, error, ties)


def lines(result: Probe) -> list[tuple[str, str, str]]:
    """Measure, real, generated: what the table shows."""
    found = result.differences
    length = found.length_difference
    rows = [
        ("tokens of an answer", f"{found.length_real.value:.1f}", f"{found.length_generated.value:.1f}"),
        ("answers that end", f"{found.ended_real:.1%}", f"{found.ended_generated:.1%}"),
    ]
    if length.value is not None and length.error is not None:
        rows.append(("difference of lengths, pair by pair", f"{length.value:+.1f} ± {length.error:.1f}", ""))
    return rows + [
        (f"answers with “{phrase.text}”", f"{phrase.real:.1%}", f"{phrase.generated:.1%}") for phrase in found.phrases
    ]


def verdict(result: Probe) -> list[str]:
    """Plain sentences about what was measured. They are no promise: see docs/when-self-play-helps.md."""
    found = result.differences
    said = [
        f"{found.identical:.1%} of the generated answers equal the real one, token for token: nothing is learned from those."
    ]
    if result.accuracy is None or result.accuracy_error is None:
        return [*said, "No held-out pair has two different answers: there is nothing to learn."]
    accuracy = f"After {result.steps} steps the policy wins {result.accuracy:.1%} ± {result.accuracy_error:.1%} of the held-out pairs that differ"
    if result.accuracy - 2 * result.accuracy_error <= 0.5:
        said.append(
            f"{accuracy}: no better than chance, so it has found no difference that carries over to other prompts."
        )
    else:
        said.append(f"{accuracy}: there is a difference that carries over to other prompts.")
    if found.phrases:
        said.append(
            f"{_strongest(found.phrases)} Self-play pushes towards the real answers' side of each difference, and for a small beta beyond it."
        )
    else:
        said.append("No phrase sets the two apart beyond chance.")
    return said


def _strongest(phrases: list[Phrase]) -> str:
    first = phrases[0]
    return f"What sets them apart most is “{first.text}” ({first.real:.0%} of the real answers, {first.generated:.0%} of the generated ones)."


def print_probe(result: Probe) -> None:
    """The table and the sentences, on the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result.differences.pairs} pairs", box=box.SIMPLE_HEAD, title_justify="left", padding=0)
    table.add_column("")
    for side in ("real", "generated"):
        table.add_column(f"  {side}", justify="right")
    for row in lines(result):
        table.add_row(*row)
    console = Console()
    console.print(table)
    for sentence in verdict(result):
        console.print(sentence, soft_wrap=True, highlight=False)
