"""Megatron checkpoint to Hugging Face directory, alone or under torchrun, at any parallel layout."""

import argparse
import dataclasses
import os
import time
from pathlib import Path

from megatron_spin import cli
from megatron_spin.errors import ConfigError, RunDirError
from megatron_spin.phases import conversion_arguments as conversion


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(description=__doc__)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="checkpoint directory; its latest step counts (default: the target's checkpoints)",
    )
    parser.add_argument(
        "--hf", type=Path, metavar="DIR", help="Hugging Face directory to write (default: the target's hf)"
    )
    parser.add_argument(
        "--dtype",
        choices=["fp32", "bf16"],
        help="dtype of the files (default: the config's precision.export, else the checkpoint's own)",
    )
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--iteration", type=int, metavar="T", help="with --config: self-play iteration, from 0")
    target.add_argument("--baseline", metavar="NAME", help="with --config: a name under `baselines`")
    conversion.add_arguments(parser)
    return cli.parse(parser)


def main() -> None:
    started = time.monotonic()
    arguments = parse_arguments()
    named = arguments.iteration is not None or arguments.baseline is not None
    if named != (arguments.config is not None):
        raise ConfigError("--config goes together with --iteration T or --baseline NAME: give both or neither")
    run = conversion.read_run(arguments)
    target = run[1].target(iteration=arguments.iteration, baseline=arguments.baseline) if run else None
    phase = f"export:{target.label}" if target else "export"
    if run is not None and run[1].is_done(phase):
        print(f"{phase}: already done")
        return
    if run is not None and target is not None:
        if not run[1].is_done(f"train:{target.label}"):
            raise RunDirError(
                f"train:{target.label} has not finished: finish it first, or export without --config to look at a checkpoint"
            )
        for given, own in ((arguments.checkpoint, target.checkpoints), (arguments.hf, target.hf)):
            if given is not None and given.resolve() != own.resolve():
                raise ConfigError(
                    f"{given} is not this run's {own}: leave --checkpoint and --hf out, or leave --config out"
                )
    checkpoint = arguments.checkpoint or (target.checkpoints if target else None)
    out_dir = arguments.hf or (target.hf if target else None)
    if checkpoint is None or out_dir is None:
        raise ConfigError(
            "--checkpoint and --hf are both needed without --config: give the checkpoint's directory and the one to write"
        )

    from megatron_spin.hf.assets import CHECKPOINT_ASSETS, stored_dtype
    from megatron_spin.hf.files import read_hf_config
    from megatron_spin.parallel.setup import check_config, choose_device, initialize

    assets = checkpoint / CHECKPOINT_ASSETS
    dtype = arguments.dtype or (run[0].precision.export_dtype if run else stored_dtype(read_hf_config(assets)))
    config = conversion.conversion_config(
        arguments, run[0] if run else None, hf_dir=assets, dtype=run[0].precision.dtype if run else dtype
    )
    device = choose_device(config.device)
    check_config(config, device, world_size=int(os.environ.get("WORLD_SIZE", "1")))

    from megatron_spin.phases.export_model import export_model

    dims = initialize(config.parallel, device)
    result = export_model(config, checkpoint, out_dir, dims=dims, dtype=dtype)
    if dims.rank == 0:
        print(f"{phase}: {checkpoint} -> {out_dir}, {result}")
        if run is not None:
            run[1].mark_done(
                phase,
                seconds=time.monotonic() - started,
                identity=result.identity,
                dtype=dtype,
                step=result.step,
                **dataclasses.asdict(result.parity),
            )


if __name__ == "__main__":
    cli.run(main)
