"""What can be checked before anything is started, so that a mistake costs seconds and not a night."""

import importlib.util
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_spin.config import Config, Engine, at_iteration
from megatron_spin.errors import CheckpointError, ConfigError, DataError, RunDirError
from megatron_spin.io import read_json
from megatron_spin.phases.guard import played
from megatron_spin.run.plan import Plan, Step, gpu_count, processes
from megatron_spin.run.resume import check_resume

CHECKPOINT_BYTES = 18
"""Bytes a parameter that one trained model takes: fp32 weights, two fp32 moments, fp32 or bf16 model weights, and the export."""

WEIGHT_FILES = ("*.safetensors",)


def check(plan: Plan, steps: Sequence[Step]) -> None:
    """Checks what the phases of ``steps`` that are still to do will need.

    Raises:
        SpinError: the first thing that is missing or cannot be, in one line.
    """
    todo = {step.phase for step in steps if not (step.done or step.left_out)}
    if not todo:
        return
    config, root = plan.config, plan.run_dir.root
    check_resume(plan.run_dir, config)
    _check_baselines(plan)
    _check_model(Path(config.model.hf))
    if "prepare" in todo:
        _check_data(config)
    if any(phase.startswith("train:") for phase in todo):
        _check_training(config)
    _check_engines(config, [phase for phase in todo if phase.startswith(("generate:", "evaluate:"))])
    models = sum(phase == "import" or phase.startswith("train:") for phase in todo)
    _check_disk(root, Path(config.model.hf), models)


def _check_baselines(plan: Plan) -> None:
    """A finished baseline must have the steps of as many iterations as are played now; more of them, or a rollback lifted, would make it stale."""
    run_dir, now = plan.run_dir, played(plan.config, plan.run_dir)
    phases = read_json(run_dir.state)["phases"] if run_dir.state.exists() else {}
    for name, baseline in plan.config.baselines.items():
        then = phases.get(f"train:{name}", {}).get("iterations", now)
        if isinstance(baseline.steps, str) and then != now:
            raise RunDirError(
                f"baselines.{name} ({baseline.steps}) was trained with the steps of {then} iterations, but {now} are played now: give it another "
                "name under baselines, where it is trained anew"
            )


def _check_model(hf: Path) -> None:
    if not (hf / "config.json").is_file():
        raise CheckpointError(
            f"model.hf={hf} holds no config.json: give the directory of a Hugging Face model (it is not downloaded)"
        )
    if not any(any(hf.glob(pattern)) for pattern in WEIGHT_FILES):
        raise CheckpointError(
            f"model.hf={hf} holds no weights (*.safetensors): give the directory of a complete Hugging Face model"
        )


def _check_data(config: Config) -> None:
    for key, path in config.data_files.items():
        if not Path(path).exists():
            raise DataError(f"{key}={path} does not exist: give a JSONL, JSON or Parquet file of SFT data")


def _check_training(config: Config) -> None:
    """Device, formats, layout and batch, by the rules that training itself checks again."""
    import torch

    from megatron_spin.parallel.setup import check_config, choose_device

    device = torch.device("cuda" if gpu_count(config) else "cpu")
    check_config(config, device, world_size=processes(config))
    choose_device(config.device)  # before Megatron is imported, below
    from megatron_spin.training.optimizer import optimizer_config

    optimizer_config(config, learning_rate=1.0)


def _check_engines(config: Config, phases: Sequence[str]) -> None:
    iterations = {int(label) if label.isdigit() else 0 for label in (phase.partition(":")[2] for phase in phases)}
    engines: set[Engine] = {at_iteration(config.generation.engine, iteration) for iteration in iterations}
    for engine in engines:
        module = {"vllm": "vllm", "hf": "transformers"}[engine]
        if importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"generation.engine={engine} needs the Python package {module}, which {sys.executable} lacks: run `make setup`"
            )


def _check_disk(root: Path, hf: Path, models: int) -> None:
    """Refuses a run that surely cannot finish its next model, warns of one that may not finish all; old checkpoints are kept."""
    place = root
    while not place.exists():
        place = place.parent
    weights = sum(file.stat().st_size for pattern in WEIGHT_FILES for file in hf.glob(pattern))
    size = (
        4
        if read_json(hf / "config.json").get("dtype", read_json(hf / "config.json").get("torch_dtype")) == "float32"
        else 2
    )
    each, free = weights // size * CHECKPOINT_BYTES, shutil.disk_usage(place).free
    if models and free < each:
        raise RunDirError(
            f"{place} has {_gb(free)} free, one trained model takes about {_gb(each)}: free some space or choose another --run-dir"
        )
    if free < each * models:
        print(f"warning: {place} has {_gb(free)} free, this run may take {_gb(each * models)}", file=sys.stderr)


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
