"""``tools/rotate.py``."""

from megatron_spin import cli
from megatron_spin.phases.frame import Phase, carry_out
from megatron_spin.run.directory import RunDir
from megatron_spin.run.plan import end_of_iteration


def main() -> None:
    """Completes an iteration or a baseline."""
    parser = cli.config_parser(
        "Complete an iteration or a baseline: write its DONE marker. The policy of a complete iteration is the "
        "opponent of the next."
    )
    cli.add_target(parser)
    arguments = cli.parse(parser)
    config, root = cli.read_config(arguments)
    run_dir = RunDir(root)
    target = run_dir.target(iteration=arguments.iteration, baseline=arguments.baseline)

    def start() -> Phase:
        from megatron_spin.phases.rotate import Rotate

        return Rotate(config, run_dir, target)

    kind = end_of_iteration(config) if target.baseline is None else "finish"
    carry_out(kind, config, run_dir, start, target=target)
