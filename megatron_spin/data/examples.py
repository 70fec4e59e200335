"""The examples of a training, read from a memory-mapped table as the batcher asks for them."""

from collections.abc import Sequence

from megatron_spin.data.batcher import Example
from megatron_spin.data.lazy import LazySequence
from megatron_spin.data.table import Table


def examples_of(table: Table, answers: Sequence[str]) -> Sequence[Example]:
    """One example per row, with the columns ``NAME_ids`` of ``answers``; its ids are views of the file."""
    prompts = table.tokens("prompt_ids")
    columns = [table.tokens(f"{answer}_ids") for answer in answers]

    def example(row: int) -> Example:
        return Example(prompts[row], tuple(column[row] for column in columns))

    return LazySequence(example, range(len(table)))
