"""``tools/evaluate.py``."""

from megatron_spin import cli
from megatron_spin.phases.frame import Phase, carry_out
from megatron_spin.run.directory import RunDir


def main() -> None:
    """Measures one model of a run."""
    parser = cli.config_parser(
        "Measure an iteration, a baseline or the model that the run starts from (--baseline sft) on held-out prompts; "
        "write eval.json and samples.jsonl."
    )
    cli.add_target(parser)
    arguments = cli.parse(parser)
    config, root = cli.read_config(arguments)
    run_dir = RunDir(root)
    target = run_dir.target(iteration=arguments.iteration, baseline=arguments.baseline)

    def start() -> Phase:
        from megatron_spin.phases.evaluate import Evaluate

        return Evaluate(config, run_dir, target)

    carry_out("evaluate", config, run_dir, start, target=target)
