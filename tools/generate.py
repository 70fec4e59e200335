"""The opponent of an iteration answers every prompt; its answers beside the real ones are the training pairs."""

import time

from megatron_spin import cli


def main() -> None:
    parser = cli.config_parser(
        "Generate the opponent's answers of one iteration, and write the training pairs. Run it again to continue."
    )
    parser.add_argument("--iteration", type=int, metavar="T", required=True, help="self-play iteration, from 0")
    arguments = cli.parse(parser)
    config, root = cli.read_config(arguments)

    from megatron_spin.phases.generate import generate_iteration
    from megatron_spin.run.directory import RunDir

    run_dir = RunDir(root)
    run_dir.open(config)
    phase = f"generate:{arguments.iteration}"
    if run_dir.is_done(phase):
        print(f"{phase} already done")
        return
    started = time.monotonic()
    details = generate_iteration(config, run_dir, arguments.iteration)
    run_dir.mark_done(phase, seconds=time.monotonic() - started, **details)


if __name__ == "__main__":
    cli.run(main)
