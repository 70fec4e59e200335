"""bf16 self-play: the opponent is the rounded policy, the policy goes on from its unrounded fp32 main weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

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


@pytest.mark.slow
@pytest.mark.parametrize("distributed", [True, False])
def test_main_weights_carry_over_unrounded(tmp_path: Path, distributed: bool) -> None:
    config, run = (
        tiny_yaml(tmp_path, precision={"dtype": "bf16"}, parallel={"use_distributed_optimizer": distributed}),
        tmp_path / "run",
    )
    arguments = (config, "--run-dir", run, "training.learning_rate=[1.0e-3, 1.0e-12]", "training.steps=2")
    run_tool("prepare.py", *arguments)
    run_tool("import_hf.py", "--hf", tmp_path / "model", "--checkpoint", run / "base", "--config", *arguments)
    for iteration in (0, 1):
        run_tool("generate.py", *arguments, "--iteration", iteration)
        run_tool("train.py", *arguments, "--iteration", iteration)
        target = run / f"iteration_{iteration}"
        run_tool(
            "export_hf.py",
            "--checkpoint",
            target / "checkpoints",
            "--hf",
            target / "hf",
            "--config",
            *arguments,
            "--iteration",
            iteration,
        )
        assert metrics(target / "metrics.jsonl")[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert json.loads((run / "iteration_0/hf/export.json").read_text())["dtype"] == "bf16"
    with worlds() as world:
        first, second = (world(1).run(main_weights, str(run / f"iteration_{t}/checkpoints"))[0] for t in (0, 1))
    assert first and first.keys() == second.keys()
    for name, weights in first.items():
        np.testing.assert_allclose(second[name], weights, rtol=0, atol=1e-9, err_msg=name)
    rounding = max(float(np.abs(w - torch.from_numpy(w).bfloat16().float().numpy()).max()) for w in first.values())
    assert rounding > 1e-6, "the first iteration must leave weights that bf16 cannot hold, else this compares nothing"
