"""What the two conversion commands share: arguments, and the run that a conversion may be a phase of."""

import argparse
import dataclasses
from pathlib import Path

from megatron_spin.config import Config, DataConfig, ModelConfig, ParallelConfig, PrecisionConfig, load_config
from megatron_spin.errors import ConfigError
from megatron_spin.parallel.collectives import on_rank_zero
from megatron_spin.processes import Ranks, rank, world_size
from megatron_spin.run.directory import RunDir
from megatron_spin.run.resume import as_started


@dataclasses.dataclass(frozen=True)
class Run:
    """The run that a conversion is a phase of."""

    config: Config
    run_dir: RunDir


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the layout, and the config and run directory of a run whose phase this is."""
    parser.add_argument(
        "--tensor-model-parallel-size",
        type=int,
        metavar="N",
        help="with torchrun: ranks per layer (default: the config's, else 1)",
    )
    parser.add_argument(
        "--pipeline-model-parallel-size",
        type=int,
        metavar="N",
        help="with torchrun: pipeline stages (default: the config's, else 1)",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="CONFIG",
        help="a run's YAML file: take model and precision from it, mark the phase done",
    )
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="with --config: run directory (default: runs/NAME)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="with --config: overrides with dots")


def read_run(arguments: argparse.Namespace) -> Run | None:
    """The run of ``--config``; None without.

    Raises:
        ConfigError: ``--run-dir`` or overrides without ``--config``, or a bad config.
    """
    if arguments.config is None:
        if arguments.run_dir is not None or arguments.overrides:
            raise ConfigError(
                f"{arguments.run_dir or ' '.join(arguments.overrides)}: --run-dir and overrides need --config CONFIG"
            )
        return None
    config = load_config(arguments.config, arguments.overrides)
    return Run(config, RunDir(arguments.run_dir or Path("runs") / config.name))


def check_is_own(given: Path | None, own: Path) -> None:
    """Refuses a path that is not the run's own.

    Raises:
        ConfigError: it is another.
    """
    if given is not None and given.resolve() != own.resolve():
        raise ConfigError(f"{given} is not this run's {own}: leave --checkpoint and --hf out, or leave --config out")


def conversion_config(arguments: argparse.Namespace, run: Run | None, *, hf_dir: Path, dtype: str) -> Config:
    """The configuration to build the model with: the run's or defaults, with ``hf_dir``, ``dtype`` and the layout.

    The layout is what the arguments say; without them the run's tensor and pipeline parallel sizes, or one process.

    Raises:
        ConfigError: a parallel size is less than 1.
    """
    if run is not None:
        started = run
        base = on_rank_zero(Ranks(rank(), world_size()), lambda: as_started(started.run_dir, started.config))
    else:
        # A conversion reads no data, but every configuration names some.
        base = Config(name="conversion", model=ModelConfig(hf=str(hf_dir)), data=DataConfig(path=""))
    tensor, pipeline = arguments.tensor_model_parallel_size, arguments.pipeline_model_parallel_size
    if tensor is None and pipeline is None and world_size() > 1:
        tensor, pipeline = base.parallel.tensor_model_parallel_size, base.parallel.pipeline_model_parallel_size
    parallel = ParallelConfig(
        tensor_model_parallel_size=1 if tensor is None else tensor,
        pipeline_model_parallel_size=1 if pipeline is None else pipeline,
        timeout=base.parallel.timeout,
    )
    sizes = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if min(sizes) < 1:
        raise ConfigError(f"parallel sizes {sizes[0]} and {sizes[1]} must be at least 1")
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, hf=str(hf_dir)),
        parallel=parallel,
        precision=PrecisionConfig(dtype="fp32" if dtype == "fp32" else "bf16", export=base.precision.export),
    )
