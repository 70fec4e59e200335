"""Reads, checks and tokenizes the data once; everything later works on its output."""

import time
from pathlib import Path

from megatron_spin import cli


def main() -> None:
    parser = cli.config_parser(
        "Read, check and tokenize the data into RUN_DIR/data, with a held-out part if the config asks for one."
    )
    config, root = cli.read_config(cli.parse(parser))

    from megatron_spin.data.preparation import prepare
    from megatron_spin.phases.prepare import counts_table
    from megatron_spin.run.directory import RunDir

    run_dir = RunDir(root)
    if run_dir.config.exists():
        run_dir.open(config)
    if run_dir.is_done("prepare"):
        print("prepare already done")
        return
    started = time.monotonic()
    prepared = prepare(config)
    run_dir.open(config)  # only now: a typing error in data.path must not bind the directory to it
    prepared.save(run_dir.data)
    manifest = prepared.manifest
    if prepared.pairs is not None:  # DPO: the pairs are given, and the opponent is the model that the run begins with
        from megatron_spin.conversion.identity import identity
        from megatron_spin.data.pairs import TWO_ANSWERS, save_pairs

        opponent = identity(Path(config.model.hf), config.precision.export_dtype)
        save_pairs(
            run_dir.target(iteration=0).pairs,
            prepared.pairs,
            answers=TWO_ANSWERS,
            opponent=opponent,
            data=manifest["identity"],
        )
    print(counts_table(manifest, config))
    run_dir.mark_done(
        "prepare", seconds=time.monotonic() - started, identity=manifest["identity"], prompts=manifest["counts"]["kept"]
    )


if __name__ == "__main__":
    cli.run(main)
