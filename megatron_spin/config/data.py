"""Section ``data``."""

import dataclasses
from typing import Annotated, Literal

from megatron_spin.config.values import Positive


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The training data and how they become token ids."""

    path: str
    """SFT data: JSONL, JSON or Parquet with prompt/response, instruction/input/output, question/answer or messages.

    For ``training.objective: dpo`` rows of prompt/chosen/rejected; both answers are text, or messages of which the
    last is the answer. For other objectives such a row counts with its chosen answer.
    """
    template: Literal["instruction", "chat", "none"] = "instruction"
    """``instruction`` is the paper's, ``chat`` is the tokenizer's own, ``none`` takes the prompt unchanged."""
    end_token: str | None = None
    """Token that ends an answer and stops generation; null: the tokenizer's EOS."""
    num_prompts: Annotated[int | None, Positive] = None
    """How many rows to use, drawn with ``seed``; null: all."""
    max_length: Annotated[int, Positive] = 2048
    """Longest prompt and answer together, in tokens; longer answers are cut and lose their end token."""
    max_prompt_length: Annotated[int | None, Positive] = None
    """Rows with longer prompts, in tokens, are dropped and counted; null: half of ``max_length``."""
    max_answer_length: Annotated[int | None, Positive] = None
    """Rows with longer answers, in tokens with the end token, are dropped and counted; null: such answers are cut and
    lose their end token."""
    seed: int = 0
    """Seed of the draw and of the order of rows."""

    @property
    def prompt_limit(self) -> int:
        """Longest prompt, in tokens."""
        return self.max_prompt_length or self.max_length // 2
