"""On one GPU: loss, gradients, RMSProp and one self-play iteration; Transformer Engine's layer spec against ours.

The tests skip themselves without a GPU.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_spin.config import Config, at_iteration
from megatron_spin.machine import version_of
from tests.support.ranks import TokenPair, first_gradients, make_trainer, random_pairs, tiny_config
from tests.support.runs import metrics, run_tool, tiny_yaml
from tests.support.tiny import tiny_model
from tests.support.world import World, worlds

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
needs_transformer_engine = pytest.mark.skipif(
    version_of("transformer-engine") is None, reason="needs Transformer Engine"
)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with worlds() as getter:
        yield getter(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tiny_model(directory, tokenizer=False)
    return directory


def step(world: World, model: Path, **sections: Any) -> Any:
    pairs = random_pairs(16, vocabulary=100)
    scores = np.full((16, 2), -40.0, dtype=np.float32)
    [result] = world.run(first_gradients, tiny_config(model, device="cuda", **sections), pairs, scores)
    return result


def distance(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, float]:
    return {
        name: float(np.linalg.norm(actual[name] - expected[name]) / np.linalg.norm(expected[name])) for name in expected
    }


def test_gpu_equals_cpu_in_fp32(world: World, model: Path) -> None:
    pairs, scores = random_pairs(16, vocabulary=100), np.full((16, 2), -40.0, dtype=np.float32)
    with worlds() as getter:  # the CPU adapter and CUDA do not share a process
        [(named, grads)] = getter(1).run(first_gradients, tiny_config(model), pairs, scores)
    on_gpu, gpu_grads = step(world, model, layer_spec="local")
    assert on_gpu["loss"] == pytest.approx(named["loss"], rel=1e-4)
    assert max(distance(gpu_grads, grads).values()) < 1e-3


@needs_transformer_engine
def test_transformer_engine_spec_equals_the_local_one(world: World, model: Path) -> None:
    precision, bound = {"dtype": "bf16"}, 1e-2
    local, local_grads = step(world, model, layer_spec="local", precision=precision)
    fused, fused_grads = step(world, model, layer_spec="transformer_engine", precision=precision)
    assert fused["loss"] == pytest.approx(local["loss"], rel=bound)
    assert max(distance(fused_grads, local_grads).values()) < 5 * bound


def rmsprop_differences(config: Config, pairs: list[TokenPair], *, steps: int) -> dict[str, float]:
    """Distance of each parameter between the trainer's RMSProp and torch's after ``steps`` gradients.

    It is relative to the distance that the parameter moved.
    """
    trainer = make_trainer(config, pairs, None, steps=steps)
    ours = dict(trainer.model[0].named_parameters())
    theirs = {name: torch.nn.Parameter(parameter.detach().clone()) for name, parameter in ours.items()}
    before = {name: parameter.detach().clone() for name, parameter in ours.items()}
    torchs = torch.optim.RMSprop(theirs.values(), lr=at_iteration(config.training.learning_rate, 0))
    torch.manual_seed(0)
    for step in range(steps):
        for name, parameter in ours.items():
            # Growing, so that eps counts at first and every step moves.
            gradient = torch.randn_like(theirs[name]) * 10.0 ** (step - 4)
            parameter.main_grad.copy_(gradient)
            theirs[name].grad = gradient
        trainer.optimizer.step()
        torchs.step()
    with torch.no_grad():
        return {name: float((ours[name] - theirs[name]).norm() / (theirs[name] - before[name]).norm()) for name in ours}


def test_rmsprop_is_torchs(world: World, model: Path) -> None:
    """Megatron may pick a fused Adam here, which is RMSProp without bias correction but rounds otherwise.

    Its formula, written out on a CPU, is 3e-7 away; with an eps larger by a tenth 8e-4, and with bias correction 0.8.
    """
    optimizer = {"optimizer": "rmsprop", "clip_grad": 0.0, "weight_decay": 0.0}
    # Not sharded: nothing but the rule of the step is to be compared.
    config = tiny_config(
        model, device="cuda", layer_spec="local", optimizer=optimizer, parallel={"use_distributed_optimizer": False}
    )
    [differences] = world.run(rmsprop_differences, config, random_pairs(8, vocabulary=100), steps=6)
    assert max(differences.values()) < 1e-5, differences


def test_one_self_play_iteration(tmp_path: Path) -> None:
    config, run = tiny_yaml(tmp_path, device="cuda", precision={"dtype": "bf16"}), tmp_path / "run"
    run_tool("prepare.py", config, "--run-dir", run)
    run_tool(
        "import_hf.py", "--hf", tmp_path / "model", "--checkpoint", run / "base", "--config", config, "--run-dir", run
    )
    run_tool("generate.py", config, "--run-dir", run, "--iteration", 0)
    run_tool("train.py", config, "--run-dir", run, "--iteration", 0)
    rows = metrics(run / "iteration_0/metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-3)
    target = run / "iteration_0"
    run_tool("export_hf.py", "--checkpoint", target / "checkpoints", "--hf", target / "hf")
    assert (target / "hf/model.safetensors").exists()
    shutil.rmtree(run)
