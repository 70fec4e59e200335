"""Checkpoints: exact resumption, other layouts, main weights at the end of an iteration, memory, and hostile files."""

import importlib.metadata
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_spin.config import Config
from tests.support.checkpoints import (
    VOCABULARY,
    export_identity,
    first_row,
    load,
    load_again_and_save,
    load_with_an_unreadable_file,
    peaks,
    recompute_checksums,
    refusal,
    save,
    save_with_an_unwritable_file,
    stale,
    tensors,
    trained_identity,
    without,
)
from tests.support.ranks import tiny_config
from tests.support.tiny import tiny_model
from tests.support.world import Worlds

MEGATRON = tuple(int(number) for number in importlib.metadata.version("megatron-core").split(".")[:2])
ADAM = {"optimizer": "adam", "clip_grad": 1.0}
OVERLAP = {"ddp": {"overlap_grad_reduce": True, "overlap_param_gather": True}}
TP2: dict[str, Any] = {"tensor_model_parallel_size": 2}
PP2: dict[str, Any] = {"pipeline_model_parallel_size": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model(path, vocabulary=VOCABULARY, tokenizer=False)
    return path


def config_of(model: Path, dtype: str, *, optimizer: dict[str, Any] = ADAM, **parallel: Any) -> Config:
    training = {"learning_rate": 1e-3, "schedule": "linear"}
    return tiny_config(model, precision={"dtype": dtype}, optimizer=optimizer, parallel=parallel, training=training)


def same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("ranks", "dtype", "optimizer", "parallel", "resharding"),
    [
        (2, "fp32", ADAM, {}, "data_parallel"),
        (2, "bf16", ADAM, {}, "data_parallel"),
        (2, "bf16", ADAM, {}, "any"),
        (2, "bf16", ADAM, OVERLAP, "data_parallel"),
        (2, "bf16", ADAM, {"use_distributed_optimizer": False}, "data_parallel"),
        (1, "fp32", {"optimizer": "sgd", "sgd_momentum": 0.9}, {}, "data_parallel"),
        (2, "bf16", {"optimizer": "sgd", "sgd_momentum": 0.9}, {}, "data_parallel"),
        (1, "bf16", {"optimizer": "sgd", "sgd_momentum": 0.0}, {}, "data_parallel"),
    ],
    ids=lambda value: value.get("optimizer", "-".join(value)) if isinstance(value, dict) else str(value),
)
def test_resumed_equals_uninterrupted_bit_for_bit(
    world: Worlds,
    model: Path,
    tmp_path: Path,
    ranks: int,
    dtype: str,
    optimizer: dict[str, Any],
    parallel: dict[str, Any],
    resharding: str,
) -> None:
    config = config_of(model, dtype, optimizer=optimizer, **parallel)
    saved, losses = world(ranks).run(save, config, tmp_path, taken=3, resharding=resharding)[0]
    loaded, resumed, state = world(ranks).run(load, config, tmp_path, steps=3)[0]
    assert same(loaded, saved)
    assert resumed == losses and len(set(losses)) == 3
    assert state == {"opponent": "x", "step": 3}


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
@pytest.mark.parametrize("parallel", [{}, OVERLAP], ids=["one bucket", "overlap"])
def test_the_number_of_data_parallel_ranks_may_change(
    world: Worlds, model: Path, tmp_path: Path, before: int, after: int, parallel: dict[str, Any]
) -> None:
    config = config_of(model, "bf16", **parallel)
    saved, losses = world(before).run(save, config, tmp_path, taken=3)[0]
    loaded, resumed, _ = world(after).run(load, config, tmp_path, steps=3)[0]
    assert same(loaded, saved)
    assert resumed == pytest.approx(losses, rel=1e-3)


@pytest.mark.parametrize(("before", "after"), [({}, TP2), (TP2, PP2), (PP2, {})], ids=["DP-TP", "TP-PP", "PP-DP"])
def test_any_layout_loads_what_was_saved_for_any(
    world: Worlds, model: Path, tmp_path: Path, before: dict[str, Any], after: dict[str, Any]
) -> None:
    saved, losses = world(2).run(save, config_of(model, "fp32", **before), tmp_path, taken=3, resharding="any")[0]
    loaded, resumed, _ = world(2).run(load, config_of(model, "fp32", **after), tmp_path, steps=3)[0]
    assert same(loaded, saved)
    assert resumed == pytest.approx(losses, rel=1e-4)


def test_another_layout_is_refused_where_the_state_lies_as_in_memory(
    world: Worlds, model: Path, tmp_path: Path
) -> None:
    world(2).run(save, config_of(model, "fp32"), tmp_path, taken=1)
    for found in world(2).run(refusal, config_of(model, "fp32", **TP2), tmp_path):
        assert "tensor=1, pipeline=1" in found and "cannot be loaded with tensor=2, pipeline=1" in found
        assert "training.checkpoint_resharding=any" in found and "\n" not in found


def test_other_buckets_are_refused(world: Worlds, model: Path, tmp_path: Path) -> None:
    small = {"ddp": {**OVERLAP["ddp"], "bucket_size": 10_000}}
    world(2).run(save, config_of(model, "bf16", **small), tmp_path, taken=1)
    [found, other] = world(2).run(refusal, config_of(model, "bf16"), tmp_path)
    assert found == other
    assert "bucket=10000" in found and "cannot be loaded with" in found and "bucket=0" in found


@pytest.mark.parametrize("distributed", [True, False], ids=["shared out", "whole"])
def test_the_end_of_an_iteration_is_main_weights_alone(
    world: Worlds, model: Path, tmp_path: Path, distributed: bool
) -> None:
    config = config_of(model, "bf16", use_distributed_optimizer=distributed)
    world(2).run(save, config, tmp_path / "whole", taken=3, resharding="any")
    world(2).run(save, config, tmp_path / "end", taken=3, moments=False)
    whole, end = tensors(tmp_path / "whole/iter_0000003"), tensors(tmp_path / "end/iter_0000003")
    assert end.keys() == {name for name in whole if not name.startswith("optimizer.")}
    assert {dtype for _, dtype in end.values()} == {torch.float32}
    assert {name: size for name, (size, _) in end.items()} == {name: whole[name][0] for name in end}


@pytest.mark.parametrize("reduce_in_fp32", [True, False], ids=["fp32 gradients", "bf16 gradients"])
def test_an_iteration_starts_from_unrounded_weights_at_any_layout(
    world: Worlds, model: Path, tmp_path: Path, reduce_in_fp32: bool
) -> None:
    ddp = {"grad_reduce_in_fp32": reduce_in_fp32}
    config = config_of(model, "bf16", ddp=ddp)
    world(2).run(save, config, tmp_path / "end", taken=3, moments=False)
    fp32 = config_of(model, "fp32")
    unrounded = world(2).run(load, fp32, tmp_path / "end", moments=False)[0][0]
    rounded = world(2).run(load, config, tmp_path / "end", moments=False)[0][0]
    assert not same(unrounded, rounded)  # else nothing is compared
    for name, parallel in {"DP": {}, "TP": TP2, "PP": PP2, "whole": {"use_distributed_optimizer": False}}.items():
        other = config_of(model, "bf16", ddp=ddp, **parallel)
        world(2).run(load_again_and_save, other, tmp_path / "end", tmp_path / name)
        assert same(world(2).run(load, fp32, tmp_path / name, moments=False)[0][0], unrounded), name


@pytest.mark.parametrize("parallel", [{}, {"use_distributed_optimizer": False}], ids=["shared out", "whole"])
def test_an_iteration_starts_from_a_whole_checkpoint_too(
    world: Worlds, model: Path, tmp_path: Path, parallel: dict[str, Any]
) -> None:
    """Earlier versions ended an iteration with all of the optimizer's state, and hashed whole files."""
    config = config_of(model, "bf16", **parallel)
    world(2).run(save, config, tmp_path / "whole", taken=3, resharding="any")
    recompute_checksums(tmp_path / "whole/iter_0000003")
    world(2).run(save, config, tmp_path / "end", taken=3, moments=False)
    fp32 = config_of(model, "fp32")
    unrounded = world(2).run(load, fp32, tmp_path / "end", moments=False)[0][0]
    world(2).run(load_again_and_save, config_of(model, "bf16", **TP2), tmp_path / "whole", tmp_path / "again")
    assert same(world(2).run(load, fp32, tmp_path / "again", moments=False)[0][0], unrounded)


@pytest.mark.parametrize("distributed", [True, False], ids=["shared out", "whole"])
def test_gradients_arrive_after_main_weights_were_loaded_and_saved(
    world: Worlds, model: Path, tmp_path: Path, distributed: bool
) -> None:
    config = config_of(model, "bf16", use_distributed_optimizer=distributed)
    world(2).run(save, config, tmp_path / "end", taken=1, moments=False)
    expected = world(2).run(first_row, config_of(model, "fp32"), tmp_path / "end")[0]
    row = world(2).run(first_row, config, tmp_path / "end")[0]
    assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.5)  # as far as bf16 goes; without any it is 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_export_rounds_main_weights_to_the_trainers_own_parameters(
    world: Worlds, model: Path, tmp_path: Path, ranks: int
) -> None:
    trained = world(ranks).run(trained_identity, config_of(model, "bf16"), taken=3, directory=tmp_path)[0]
    assert world(1).run(export_identity, config_of(model, "bf16"), tmp_path) == [trained]


def test_a_training_that_is_complete_is_resumed_from_main_weights(world: Worlds, model: Path, tmp_path: Path) -> None:
    config = config_of(model, "bf16")
    saved, _ = world(2).run(save, config, tmp_path, taken=3, moments=False)[0]
    loaded, _, state = world(2).run(load, config, tmp_path)[0]
    assert same(loaded, saved) and state["step"] == 3


def test_memory_of_save_and_load_is_at_most_a_share(world: Worlds, tmp_path: Path) -> None:
    """Host tensors beside those that training has, on two data parallel ranks, relative to what a rank has to write."""
    model = tmp_path / "model"
    tiny_model(model, vocabulary=VOCABULARY, tokenizer=False, hidden=256, ffn=1024, layers=4)
    ddp = {**OVERLAP["ddp"], "bucket_size": 1_000_000}
    for found in world(2).run(peaks, config_of(model, "bf16", ddp=ddp), tmp_path / "checkpoints"):
        share = (2 + 12) * found["parameters"] / 2  # half of the bf16 weights, main weights and moments
        print({name: f"{value / share:.3f}" for name, value in found.items()}, found)
        for name in ("save", "load", "save of main weights", "load of main weights"):
            assert found[name] <= 1.2 * share, (name, found)
        assert 2 <= found["buckets"] <= found["parameters"] / 1_000_000 + 1


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_overlapped_parameters_are_gathered_before_they_are_read(
    world: Worlds, model: Path, tmp_path: Path, dtype: str
) -> None:
    differences = world(2).run(stale, config_of(model, dtype, **OVERLAP), tmp_path)[0]
    assert len(differences) == 40 and not any(differences.values())


def test_only_what_is_read_is_compared_with_its_checksum(world: Worlds, model: Path, tmp_path: Path) -> None:
    config = config_of(model, "bf16")
    world(2).run(save, config, tmp_path, taken=1)
    alter(tmp_path / "iter_0000001", "optimizer.")
    assert "bucket_idx_0" in str(tensors(tmp_path / "iter_0000001"))
    assert len(world(1).run(export_identity, config, tmp_path)[0]) == 64
    for found in world(2).run(refusal, config, tmp_path):
        assert "is corrupted (its SHA-256 differs): restore it" in found and "\n" not in found


def alter(path: Path, prefix: str) -> None:
    """Changes one bit of the first tensor whose key begins with ``prefix``."""
    from megatron_spin.training.safe_load import read_metadata

    stored = read_metadata(path).storage_data
    info = next(info for index, info in stored.items() if index.fqn.startswith(prefix) and index.offset is not None)
    data = bytearray((path / info.relative_path).read_bytes())
    data[info.offset + info.length // 2] ^= 1
    (path / info.relative_path).write_bytes(data)


def test_extra_states_need_not_be_there(world: Worlds, model: Path, tmp_path: Path) -> None:
    """Transformer Engine's layers have others than Megatron's own, all of them empty without FP8."""
    config = config_of(model, "bf16")
    saved, losses = world(1).run(save, config, tmp_path, taken=3)[0]
    without(tmp_path / "iter_0000003", "_extra_state")
    loaded, resumed, _ = world(1).run(load, config, tmp_path, steps=3)[0]
    assert same(loaded, saved) and resumed == losses


@pytest.mark.skipif(MEGATRON >= (0, 19), reason="reads all versions")
def test_a_newer_megatrons_checkpoint_is_named(world: Worlds, model: Path, tmp_path: Path) -> None:
    """From 0.19 on plain data is kept among the tensors."""
    config = config_of(model, "fp32")
    world(1).run(save, config, tmp_path, taken=1)
    path = tmp_path / "iter_0000001"
    (path / "common.pt").unlink()
    sums = json.loads((path / "checksums.json").read_text())
    del sums["files"]["common.pt"]
    sums["megatron_core"] = "0.19.2"
    (path / "checksums.json").write_text(json.dumps(sums))
    [found] = world(1).run(refusal, config, tmp_path)
    assert "was written by megatron-core 0.19.2, which megatron-core 0.1" in found


def test_another_architecture_says_the_end_of_megatrons_error(world: Worlds, model: Path, tmp_path: Path) -> None:
    tiny_model(tmp_path / "deeper", vocabulary=VOCABULARY, tokenizer=False, layers=3)
    world(1).run(save, config_of(model, "fp32"), tmp_path, taken=1)
    [found] = world(1).run(refusal, config_of(tmp_path / "deeper", "fp32"), tmp_path, moments=False)
    assert "does not fit this model" in found and "Global shape mismatch" in found and "\n" not in found


class Hostile:
    """Pickles as a command."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.file}",))


def save_hostile(config: Config, directory: Path, file: Path, place: str) -> None:
    """Saves a checkpoint that runs a command in whoever unpickles the object at ``place``."""
    from tests.support.checkpoints import trainer_of

    trainer = trainer_of(config, taken=1)
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.tensor_parallel import ColumnParallelLinear

    from megatron_spin.training.checkpoint import save_checkpoint

    class HostileOptimizer(DistributedOptimizer):
        def state_dict(self) -> Any:
            return {**super().state_dict(), "optimizer": Hostile(file)}

    class HostileLinear(ColumnParallelLinear):
        def get_extra_state(self) -> Any:
            return Hostile(file)

    if place == "optimizer":
        for part in trainer.optimizer.chained_optimizers:
            part.__class__ = HostileOptimizer
    if place == "extra state":
        for module in trainer.model[0].modules():
            if type(module) is ColumnParallelLinear and module.output_size != 104:  # the output layer saves none
                module.__class__ = HostileLinear
    state = {"opponent": Hostile(file)} if place == "common" else {}
    save_checkpoint(directory, 1, trainer.model, dims=trainer.dims, optimizer=trainer.optimizer, state=state)


@pytest.mark.parametrize("has_checksums", [True, False])
@pytest.mark.parametrize("place", ["common", "extra state", "optimizer"])
def test_nothing_in_a_checkpoint_is_executed(
    world: Worlds, model: Path, tmp_path: Path, place: str, has_checksums: bool
) -> None:
    config = config_of(model, "bf16")
    executed = tmp_path / "executed"
    world(1).run(save_hostile, config, tmp_path / "checkpoints", executed, place)
    path = tmp_path / "checkpoints/iter_0000001"
    assert str(executed).encode() in b"".join(file.read_bytes() for file in path.iterdir())
    if not has_checksums:
        (path / "checksums.json").unlink()
    [found] = world(1).run(refusal, config, tmp_path / "checkpoints")
    assert not executed.exists()
    if place == "extra state":
        assert found == "loaded"  # it is never read
    else:
        assert "holds objects that are not plain data, which were not read: do not trust it" in found
        assert "\n" not in found


@pytest.mark.parametrize("name", ["metadata.json", *(["common.pt"] if MEGATRON < (0, 19) else [])])
def test_a_file_that_one_rank_cannot_read_is_an_error_of_all(
    world: Worlds, model: Path, tmp_path: Path, name: str
) -> None:
    config = config_of(model, "bf16")
    world(2).run(save, config, tmp_path, taken=1)
    found = world(2).run(load_with_an_unreadable_file, config, tmp_path, name)
    assert found == [f"[Errno 5] Input/output error: '{tmp_path / 'iter_0000001' / name}'"] * 2


@pytest.mark.parametrize(
    ("name", "message"),
    [("common.pt", "iter_0000001 could not be written: "), ("metadata.json", "[Errno 5] Input/output error: ")],
)
def test_a_file_that_rank_0_cannot_write_is_an_error_of_all(
    world: Worlds, model: Path, tmp_path: Path, name: str, message: str
) -> None:
    found = world(2).run(save_with_an_unwritable_file, config_of(model, "bf16"), tmp_path, name)
    assert found[0] == found[1]
    assert message in found[0] and found[0].endswith(", then [0, 1]")
    assert list(tmp_path.iterdir()) == []


def test_the_middle_of_an_iteration_does_not_pass_for_its_end(world: Worlds, model: Path, tmp_path: Path) -> None:
    """The optimizer's state has the unrounded weights in another order."""
    config = config_of(model, "bf16")
    world(2).run(save, config, tmp_path, taken=1)
    for found in world(2).run(refusal, config, tmp_path, moments=False):
        assert "iter_0000001 is of the middle of an iteration: " in found and "\n" not in found
    assert world(2).run(refusal, config, tmp_path) == ["loaded"] * 2


@pytest.mark.skipif(MEGATRON >= (0, 19), reason="keeps plain data among the tensors")
def test_another_tools_checkpoint_has_no_state(world: Worlds, model: Path, tmp_path: Path) -> None:
    config = config_of(model, "fp32")
    saved, _ = world(1).run(save, config, tmp_path, taken=1)[0]
    path = tmp_path / "iter_0000001"
    common = torch.load(path / "common.pt", weights_only=True)
    del common["spin"]
    torch.save(common, path / "common.pt")
    (path / "checksums.json").unlink()
    loaded, _, state = world(1).run(load, config, tmp_path)[0]
    assert same(loaded, saved) and state == {"step": 1}


def test_a_missing_file_is_named(world: Worlds, model: Path, tmp_path: Path) -> None:
    config = config_of(model, "fp32")
    world(2).run(save, config, tmp_path, taken=1)
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "iter_0000001", copy / "iter_0000001")
    (copy / "latest_checkpointed_iteration.txt").write_text("1")
    file = min((copy / "iter_0000001").glob("__1_*"))
    file.unlink()
    for found in world(2).run(refusal, config, copy):
        assert f"{file} is missing: restore it" in found
