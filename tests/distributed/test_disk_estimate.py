"""The disk that a run is said to take, against the bytes of real checkpoints."""

from pathlib import Path
from typing import Any

import pytest

from megatron_spin.run.estimate import checkpoint_bytes, estimate_disk
from tests.support.checkpoints import save
from tests.support.ranks import tiny_config
from tests.support.tiny import tiny_model
from tests.support.world import Worlds

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adam": {"optimizer": "adam"},
    "rmsprop": {"optimizer": "rmsprop"},
    "sgd": {"optimizer": "sgd", "sgd_momentum": 0.0},
    "sgd with momentum": {"optimizer": "sgd", "sgd_momentum": 0.9},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A directory, and how many parameters its model has: so many that tables of contents weigh little."""
    path = tmp_path_factory.mktemp("model")
    made = tiny_model(path, vocabulary=4000, hidden=256, heads=4, ffn=512, tokenizer=False)
    return path, sum(parameter.numel() for parameter in made.parameters())


def size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_checkpoints_have_the_estimated_bytes(
    world: Worlds, model: tuple[Path, int], tmp_path: Path, name: str, dtype: str
) -> None:
    hf, parameters = model
    config = tiny_config(hf, precision={"dtype": dtype}, optimizer=OPTIMIZERS[name])
    estimated = checkpoint_bytes(config, parameters)
    for moments, expected in zip((True, False), estimated, strict=True):
        directory = tmp_path / str(moments)
        world(1).run(save, config, directory, taken=1, moments=moments)
        measured = size(directory)
        assert measured <= expected <= 1.1 * measured, f"{measured / parameters:.2f} bytes per parameter"


def test_a_run_is_said_to_take_all_that_it_keeps(model: tuple[Path, int]) -> None:
    """A 7B with the paper's settings: four iterations and one baseline."""
    config = tiny_config(model[0], precision={"dtype": "bf16"}, optimizer=OPTIMIZERS["rmsprop"])
    billion = estimate_disk(config, 10**9, imports=1, models=5)
    # Resident per model: one full checkpoint (14 bytes per parameter), main weights (4) and the export (2).
    assert billion.resident == pytest.approx((2 + 5 * (14 + 4 + 2)) * 1e9, rel=0.04)
    # While one is made: both that stay, and the third before the oldest goes.
    assert billion.next_model == pytest.approx(3 * 14e9, rel=0.04)
    assert billion.peak == pytest.approx((2 + 4 * 20 + 42) * 1e9, rel=0.04)
    assert estimate_disk(config, 10**9, imports=0, models=0).peak == 0
