"""Hugging Face directory to Megatron checkpoint (step 0), alone or under torchrun, at any parallel layout."""

import argparse
import dataclasses
import os
import time
from pathlib import Path

from megatron_spin import cli
from megatron_spin.errors import ConfigError
from megatron_spin.phases import conversion_arguments as conversion


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(description=__doc__)
    parser.add_argument(
        "--hf", type=Path, metavar="DIR", help="Hugging Face model directory (default: the config's model.hf)"
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="checkpoint directory to write (default: RUN_DIR/base)"
    )
    parser.add_argument(
        "--dtype",
        choices=["fp32", "bf16"],
        help="dtype of the weights (default: the config's precision.dtype, else the model's own)",
    )
    conversion.add_arguments(parser)
    return cli.parse(parser)


def main() -> None:
    started = time.monotonic()
    arguments = parse_arguments()
    run = conversion.read_run(arguments)
    if run is not None and run[1].is_done("import"):
        print("import: already done")
        return
    if run is not None and arguments.checkpoint is not None and arguments.checkpoint.resolve() != run[1].base.resolve():
        raise ConfigError(
            f"{arguments.checkpoint} is not this run's {run[1].base}: leave --checkpoint out, or leave --config out"
        )
    source = arguments.hf or (Path(run[0].model.hf) if run else None)
    checkpoint = arguments.checkpoint or (run[1].base if run else None)
    if source is None or checkpoint is None:
        raise ConfigError(
            "--hf and --checkpoint are both needed without --config: give the model's directory and the one to write"
        )

    from megatron_spin.hf.assets import stored_dtype
    from megatron_spin.hf.files import read_hf_config
    from megatron_spin.parallel.setup import check_config, choose_device, initialize

    dtype = arguments.dtype or (run[0].precision.dtype if run else stored_dtype(read_hf_config(source)))
    config = conversion.conversion_config(arguments, run[0] if run else None, hf_dir=source, dtype=dtype)
    device = choose_device(config.device)
    check_config(config, device, world_size=int(os.environ.get("WORLD_SIZE", "1")))

    from megatron_spin.phases.import_model import import_model

    dims = initialize(config.parallel, device)
    result = import_model(config, checkpoint, dims=dims)
    if dims.rank == 0:
        print(f"import: {source} -> {checkpoint}, {result}")
        if run is not None:
            run[1].mark_done(
                "import",
                seconds=time.monotonic() - started,
                identity=result.identity,
                dtype=dtype,
                **dataclasses.asdict(result.parity),
            )


if __name__ == "__main__":
    cli.run(main)
