"""docs/configuration.md is what the dataclasses say."""

import dataclasses

import pytest

from megatron_spin.config import (
    BaselineConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    GenerationConfig,
    ModelConfig,
    ParallelConfig,
    PrecisionConfig,
    SpinConfig,
    TrainingConfig,
)
from scripts.write_configuration import PAGE, field_docs, markdown, page, type_text

SECTIONS = (
    Config,
    ModelConfig,
    DataConfig,
    ParallelConfig,
    PrecisionConfig,
    GenerationConfig,
    EvaluationConfig,
    SpinConfig,
    TrainingConfig,
    BaselineConfig,
)


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == page(), "run .venv/bin/python -m scripts.write_configuration"


@pytest.mark.parametrize("kind", SECTIONS)
def test_every_key_says_what_it_means(kind: type) -> None:
    sections = ("model", "data", "parallel", "precision", "generation", "evaluation", "spin", "training", "guards")
    silent = [name for name, text in field_docs(kind).items() if not text]
    assert [name for name in silent if kind is not Config or name not in sections] == []


def test_every_key_is_on_the_page() -> None:
    text = PAGE.read_text()
    for kind in SECTIONS[1:]:
        for field in dataclasses.fields(kind):
            assert f"| `{field.name}` |" in text


def test_types_and_docstrings_in_words() -> None:
    assert type_text(int | list[int]) == "integer, per iteration"
    assert type_text(dict[str, str] | None) == "mapping of names to text or `null`"
    assert markdown("over :data:`some.module.NAME` and ``code``") == "over `NAME` and `code`"
