"""Hugging Face -> Megatron -> Hugging Face is bitwise equal at every layout; every rank refuses what does not fit."""

import errno
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.roundtrip import (
    CASES,
    export_without_space,
    gate_differences,
    load_error,
    make_model,
    roundtrip,
    untied_copies_error,
)
from tests.support.world import Worlds

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {case: make_model(root / case, case, seed=seed) for seed, case in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("tp_size", "pp_size"), LAYOUTS)
def test_roundtrip_is_bitwise_equal(
    world: Worlds, models: dict[str, Path], tmp_path: Path, case: str, tp_size: int, pp_size: int
) -> None:
    if CASES[case]["heads"] % tp_size:
        tp_size = 2  # 2 heads: a smaller layout stands for it
    dtype = "bf16" if CASES[case].get("dtype") == torch.bfloat16 else "fp32"
    ranks = tp_size * pp_size
    digits = world(ranks).run(roundtrip, models[case], tmp_path / "out", tp_size=tp_size, pp_size=pp_size, dtype=dtype)
    assert len(set(digits)) == 1


Change = Callable[[dict[str, torch.Tensor]], None]


def _remove(name: str) -> Change:
    return lambda weights: weights.__delitem__(name)


def _add(name: str, like: str, scale: float = 1.0) -> Change:
    return lambda weights: weights.__setitem__(name, weights[like] * scale)


def _transpose(name: str) -> Change:
    return lambda weights: weights.__setitem__(name, weights[name].T.contiguous())


def _quantize(name: str) -> Change:
    return lambda weights: weights.__setitem__(name, weights[name].to(torch.int8))


EMBEDDING, LAST_GATE = "model.embed_tokens.weight", "model.layers.3.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_remove(LAST_GATE), f"tensor {LAST_GATE} is missing"),
        (_remove(EMBEDDING), f"tensor {EMBEDDING} is missing"),
        (
            _add("model.layers.4.mlp.gate_proj.weight", LAST_GATE),
            "tensor model.layers.4.mlp.gate_proj.weight .* has no place in the model",
        ),
        (_transpose(LAST_GATE), rf"tensor {LAST_GATE} .* has shape \(64, 128\), but the model needs \(128, 64\)"),
        (_add("lm_head.weight", EMBEDDING, 1.5), f"tensor lm_head.weight .* differs from {EMBEDDING}"),
        (_quantize(LAST_GATE), f"tensor {LAST_GATE} .* is not floating point"),
        (_add("lm_head.weight", EMBEDDING), ""),
        (_add("model.layers.0.self_attn.rotary_emb.inv_freq", "model.norm.weight"), ""),
    ],
)
@pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 1), (1, 2), (2, 2)])
def test_weights_that_do_not_fit_are_refused_on_every_rank(
    world: Worlds, models: dict[str, Path], tmp_path: Path, change: Change, message: str, tp_size: int, pp_size: int
) -> None:
    altered = shutil.copytree(models["llama_tied"], tmp_path / "altered")
    weights = load_file(altered / "model.safetensors")
    change(weights)
    save_file(weights, altered / "model.safetensors", metadata={"format": "pt"})
    errors = world(tp_size * pp_size).run(
        load_error, altered, built_from=models["llama_tied"], tp_size=tp_size, pp_size=pp_size
    )
    assert len(set(errors)) == 1
    assert re.match(message, errors[0]) if message else not errors[0], errors[0]


def test_a_model_of_another_vocabulary_is_refused(world: Worlds, models: dict[str, Path], tmp_path: Path) -> None:
    larger = make_model(tmp_path / "larger", "llama", vocabulary=200)
    errors = world(2).run(load_error, larger, built_from=models["llama"], tp_size=2, pp_size=1)
    assert len(set(errors)) == 1
    assert re.match(
        r"tensor model.embed_tokens.weight .* has shape \(200, 64\), but the model needs \(128, 64\)", errors[0]
    )


def test_copies_of_a_tied_embedding_that_differ_by_one_bit_are_caught(
    world: Worlds, models: dict[str, Path], tmp_path: Path
) -> None:
    errors = world(2).run(untied_copies_error, models["llama_tied"], tmp_path / "out")
    assert len(set(errors)) == 1 and "copy of the tied embedding differs" in errors[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 1), (2, 2)])
def test_an_export_that_cannot_be_written_leaves_nothing(
    world: Worlds, models: dict[str, Path], tmp_path: Path, tp_size: int, pp_size: int
) -> None:
    errors = world(tp_size * pp_size).run(
        export_without_space, models["llama"], tmp_path / "out", tp_size=tp_size, pp_size=pp_size, limit=45_000
    )
    assert errors == [errno.EFBIG] * (tp_size * pp_size)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("case", "tp_size", "pp_size"),
    [("llama_tied", 1, 1), ("llama", 2, 1), ("mistral", 1, 2), ("llama_one_kv_head", 2, 2)],
)
def test_the_gate_catches_one_altered_weight(
    world: Worlds, models: dict[str, Path], tmp_path: Path, case: str, tp_size: int, pp_size: int
) -> None:
    """One element of a tensor changed by 2%, the largest one; the smallest fault that was caught is printed."""
    names = ["model.layers.0.self_attn.v_proj.weight", "model.layers.3.mlp.down_proj.weight", "model.norm.weight"]
    faults = [(name, change) for name in names for change in (0.02, 0.001)]
    sound, *results = world(tp_size * pp_size).run(
        gate_differences, models[case], tmp_path, tp_size=tp_size, pp_size=pp_size, faults=faults
    )[0]
    assert isinstance(sound, float) and sound <= 2e-5, sound
    caught = {fault: isinstance(result, str) for fault, result in zip(faults, results, strict=True)}
    print({name: min(change for (n, change), found in caught.items() if n == name and found) for name in names})
    for fault, found in caught.items():
        assert found or fault[1] < 0.02, fault
    assert all(re.search(r"differ by \S+ nats per token", result) for result in results if isinstance(result, str))


def test_the_gate_knows_a_model_that_rounding_moves_from_a_wrong_one(world: Worlds, tmp_path: Path) -> None:
    """In bf16 a deep model with large weights differs from transformers by more than the fixed bound.

    Real models do so on random tokens.
    """
    hf_dir = make_model(tmp_path / "model", "llama", layers=8, scale=0.2, dtype=torch.bfloat16)
    faults = [("model.norm.weight", 3.0), ("model.layers.0.self_attn.v_proj.weight", 3.0)]
    sound, *results = world(1).run(
        gate_differences, hf_dir, tmp_path, tp_size=1, pp_size=1, faults=faults, dtype="bf16"
    )[0]
    print(sound, results)
    assert isinstance(sound, float) and sound > 0.02
    assert all(
        isinstance(result, str) and "in fp32 and the Megatron model in bf16 differ by" in result for result in results
    )
