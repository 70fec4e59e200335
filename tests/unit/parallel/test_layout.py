"""Layouts that are refused before a process group exists."""

from typing import Any

import pytest

from megatron_spin.config import Config
from megatron_spin.errors import ConfigError
from megatron_spin.parallel.layout import alignment, check_layout, layout_errors
from tests.support.configs import build

HF = {
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "hidden_size": 64,
}


def config(*, parallel: dict[str, Any] | None = None, training: dict[str, Any] | None = None) -> Config:
    return build(parallel=parallel or {}, training={"global_batch_size": 16, "micro_batch_size": 2, **(training or {})})


def layout(
    tp: int = 1, pp: int = 1, *, world_size: int, training: dict[str, Any] | None = None, **changes: Any
) -> list[str]:
    parallel = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    return layout_errors(config(parallel=parallel, training=training), {**HF, **changes}, world_size=world_size)


@pytest.mark.parametrize(
    ("tp", "pp", "world_size"),
    [(1, 1, 1), (2, 1, 2), (4, 1, 4), (8, 1, 8), (2, 2, 4), (1, 4, 8), (2, 2, 16), (1, 1, 8)],
)
def test_layouts_that_fit(tp: int, pp: int, world_size: int) -> None:
    """TP 4 and 8 exceed the 2 key/value heads: Megatron shares them between ranks."""
    assert layout(tp, pp, world_size=world_size) == []


@pytest.mark.parametrize(
    ("errors", "factors"),
    [
        (
            layout(3, world_size=3, num_key_value_heads=3, training={"global_batch_size": 2}),
            ["tensor_model_parallel_size=3", "heads=8"],
        ),
        (layout(8, world_size=8, intermediate_size=100), ["tensor_model_parallel_size=8", "intermediate_size=100"]),
        (layout(2, world_size=2, num_key_value_heads=5), ["tensor_model_parallel_size=2", "num_key_value_heads=5"]),
        (
            layout(pp=3, world_size=3, training={"global_batch_size": 2}),
            ["pipeline_model_parallel_size=3", "num_hidden_layers=4"],
        ),
        (layout(2, 2, world_size=6), ["6 processes", "the 4 of one replica", "tensor 2 x pipeline 2 x context 1"]),
        (
            layout(2, world_size=6),
            [
                "global_batch_size=16",
                "micro_batch_size=2",
                "3 data parallel ranks",
                "6 processes / tensor 2 / pipeline 1 / context 1",
            ],
        ),
    ],
)
def test_each_error_names_every_factor(errors: list[str], factors: list[str]) -> None:
    assert len(errors) == 1
    assert all(factor in errors[0] for factor in factors), errors[0]


def test_all_errors_are_listed_and_raised_in_one_line() -> None:
    errors = layout(3, 3, world_size=10, intermediate_size=100)
    assert len(errors) == 5
    parallel = {"tensor_model_parallel_size": 3, "pipeline_model_parallel_size": 3}
    with pytest.raises(ConfigError) as caught:
        check_layout(config(parallel=parallel), {**HF, "intermediate_size": 100}, world_size=10)
    assert all(error in str(caught.value) for error in errors)
    assert "\n" not in str(caught.value)


def test_heads_without_groups_and_incomplete_config() -> None:
    assert layout_errors(config(), {**HF, "num_key_value_heads": None}, world_size=1) == []
    [error] = layout_errors(config(), {"num_attention_heads": 4, "num_hidden_layers": 2}, world_size=1)
    assert "lacks intermediate_size" in error


def test_the_batch_of_every_iteration_must_fit() -> None:
    [error] = layout(2, world_size=4, training={"global_batch_size": [16, 6]})
    assert "global_batch_size=6 is not a multiple of training.micro_batch_size=2 x 2 data parallel ranks" in error


def test_sequence_lengths_are_aligned_for_tensor_cores_and_sequence_parallelism() -> None:
    assert alignment(config()) == 8
    assert alignment(config(parallel={"tensor_model_parallel_size": 4})) == 8
    assert alignment(config(parallel={"tensor_model_parallel_size": 4, "sequence_parallel": True})) == 32
