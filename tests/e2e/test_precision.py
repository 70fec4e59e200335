"""bf16 self-play: the opponent is the rounded policy, the policy goes on from its unrounded fp32 main weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.roundtrip import read_weights
from tests.support.runs import metrics, run_tool, tiny_yaml
from tests.support.world import worlds


def main_weights(directory: str) -> dict[str, np.ndarray]:
    """The fp32 main weights in the latest checkpoint of ``directory``, by name."""
    from megatron_spin.parallel.setup import choose_device

    choose_device("cpu")
    from pathlib import Path

    from megatron.core import dist_checkpointing

    from megatron_spin.parallel.cpu_device import megatron_region
    from megatron_spin.training.tracker import checkpoint_path, latest_step

    path = Path(directory)
    with megatron_region():
        tensors = dist_checkpointing.load_plain_tensors(str(checkpoint_path(path, latest_step(path) or 0)))
    return {name: tensor.numpy() for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}


def two_iterations(directory: Path, settings: dict[str, Any], *overrides: str) -> Path:
    """The run directory of two iterations of two steps each, which begin with loss(0)."""
    config, run = tiny_yaml(directory, **settings), directory / "run"
    arguments = (config, "--run-dir", run, *overrides, "training.steps=2")
    as_option = ("--config", *arguments)
    run_tool("prepare.py", *arguments)
    run_tool("import_hf.py", *as_option)
    for iteration in (0, 1):
        run_tool("generate.py", *arguments, "--iteration", iteration)
        run_tool("train.py", *arguments, "--iteration", iteration)
        run_tool("export_hf.py", *as_option, "--iteration", iteration)
        first, *_ = metrics(run / f"iteration_{iteration}/metrics.jsonl")
        assert first["loss"] == pytest.approx(np.log(2), abs=1e-5)
    return run


def test_a_bf16_policy_of_an_fp32_model_exports_in_fp32(tmp_path: Path) -> None:
    """The files of the first opponent hold weights that bf16 rounds, those of the second the policy's in fp32."""
    run = two_iterations(tmp_path, {"precision": {"dtype": "bf16", "export": "fp32"}})
    first, second = (read_weights(directory) for directory in (tmp_path / "model", run / "iteration_0/hf"))
    assert all(weight.dtype == torch.float32 for weight in (*first.values(), *second.values()))
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in first.values())
    assert all(torch.equal(weight, weight.bfloat16().float()) for weight in second.values())


@pytest.mark.slow
@pytest.mark.parametrize("distributed", [True, False])
def test_main_weights_carry_over_unrounded(tmp_path: Path, distributed: bool) -> None:
    settings = {"precision": {"dtype": "bf16"}, "parallel": {"use_distributed_optimizer": distributed}}
    run = two_iterations(tmp_path, settings, "training.learning_rate=[1.0e-3, 1.0e-12]")
    assert json.loads((run / "iteration_0/hf/export.json").read_text())["dtype"] == "bf16"
    with worlds() as world:
        first, second = (world(1).run(main_weights, str(run / f"iteration_{t}/checkpoints"))[0] for t in (0, 1))
    assert first and first.keys() == second.keys()
    for name, weights in first.items():
        np.testing.assert_allclose(second[name], weights, rtol=0, atol=1e-9, err_msg=name)
    rounding = max(float(np.abs(w - torch.from_numpy(w).bfloat16().float().numpy()).max()) for w in first.values())
    assert rounding > 1e-6, "the first iteration must leave weights that bf16 cannot hold, else this compares nothing"
