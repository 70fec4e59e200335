"""Transformer Engine's modules against the families' tables, the local layers, checkpoints and the optimizer; no GPU.

:mod:`tests.support.transformer_engine` constructs them on a CPU, where none of their kernels runs.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_spin.machine import version_of
from tests.support.roundtrip import make_model
from tests.support.tiny import tiny_model
from tests.support.transformer_engine import (
    Layout,
    Spec,
    export_checkpoint,
    optimizer_roundtrip,
    parameters_of,
    roundtrip,
    sharded_keys,
    write_checkpoint,
)
from tests.support.world import Worlds, worlds

pytestmark = pytest.mark.skipif(version_of("transformer-engine") is None, reason="needs Transformer Engine")

LAYOUTS: dict[str, tuple[int, Layout]] = {
    "one": (1, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2_sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "tp4": (4, {"tensor_model_parallel_size": 4}),
    "tp2_pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}
"""Name to (ranks, section ``parallel``)."""

MODELS = ("llama_tied", "llama_one_kv_head", "mistral")


@pytest.fixture(scope="module")
def world() -> Iterator[Worlds]:
    """Worlds of their own: a process that has imported Transformer Engine keeps it."""
    with worlds() as getter:
        yield getter


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    return {case: make_model(directory / case, case, hidden=128) for case in MODELS}


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> tuple[int, Layout]:
    return LAYOUTS[request.param]


@pytest.mark.parametrize("case", MODELS)
def test_parameters_are_those_of_the_local_layers(
    world: Worlds, models: dict[str, Path], case: str, layout: tuple[int, Layout]
) -> None:
    """Every parameter has a place in the family's table, and shape, dtype and marks of its local counterpart."""
    ranks, parallel = layout
    engine = world(ranks).run(parameters_of, models[case], parallel, "transformer_engine")
    local = world(ranks).run(parameters_of, models[case], parallel, "local")
    assert engine == local


@pytest.mark.parametrize("case", MODELS)
def test_hugging_face_weights_come_back_bit_for_bit(
    world: Worlds, models: dict[str, Path], tmp_path: Path, case: str, layout: tuple[int, Layout]
) -> None:
    ranks, parallel = layout
    world(ranks).run(roundtrip, models[case], tmp_path / "out", parallel)


def test_checkpoint_keys_are_those_of_the_local_layers(
    world: Worlds, models: dict[str, Path], layout: tuple[int, Layout]
) -> None:
    ranks, parallel = layout
    engine = world(ranks).run(sharded_keys, models["mistral"], parallel, "transformer_engine")
    local = world(ranks).run(sharded_keys, models["mistral"], parallel, "local")
    assert engine == local


@pytest.mark.parametrize(("written", "read"), [("local", "transformer_engine"), ("transformer_engine", "local")])
@pytest.mark.parametrize("name", ["one", "tp2_sp", "tp2_pp2"])
def test_a_checkpoint_of_one_kind_of_layers_loads_into_the_other(
    world: Worlds, models: dict[str, Path], tmp_path: Path, written: Spec, read: Spec, name: str
) -> None:
    ranks, parallel = LAYOUTS[name]
    world(ranks).run(write_checkpoint, models["mistral"], tmp_path / "checkpoint", parallel, written)
    world(ranks).run(export_checkpoint, models["mistral"], tmp_path / "checkpoint", tmp_path / "out", parallel, read)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["adam", "rmsprop"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_state_of_fused_adam_comes_back(world: Worlds, tmp_path: Path, ranks: int, name: str, dtype: str) -> None:
    tiny_model(tmp_path / "model", tokenizer=False)
    for state in world(ranks).run(optimizer_roundtrip, tmp_path / "model", tmp_path / "checkpoint", name, dtype):
        assert state.kind == "FusedAdam"
        assert state.bias_correction == (name == "adam")
        assert state.loaded_steps == state.saved_steps
        assert_equal(state.loaded, state.saved)
        for carried_over, saved in zip(state.carried_over, state.saved, strict=True):
            assert torch.equal(carried_over["param"], saved["param"])
            assert not any(carried_over[moment].any() for moment in ("exp_avg", "exp_avg_sq") if moment in carried_over)


def assert_equal(actual: list[dict[str, torch.Tensor]], expected: list[dict[str, torch.Tensor]]) -> None:
    assert len(actual) == len(expected) > 0
    for one, other in zip(actual, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert torch.equal(value, other[name]), name
