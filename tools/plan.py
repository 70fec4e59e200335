"""Prints the plan of a run as TAB-separated lines for the driver, checks what can be checked, or marks an iteration as complete."""

from pathlib import Path

from megatron_spin import cli
from megatron_spin.run.directory import RunDir
from megatron_spin.run.plan import Plan, as_text, finish
from megatron_spin.run.preflight import check


def main() -> None:
    parser = cli.config_parser(__doc__ or "")
    parser.add_argument("--until", metavar="PHASE:T", help="leave out what comes after this phase, for example train:0")
    parser.add_argument(
        "--check", action="store_true", help="first check everything that can be checked before anything is started"
    )
    parser.add_argument(
        "--finish", metavar="PHASE:T", help="print nothing; write the DONE marker of rotate:T or finish:NAME"
    )
    arguments = cli.parse(parser)
    config, root = cli.read_config(arguments)
    plan = Plan(
        config, RunDir(root), arguments=[arguments.config, *arguments.overrides], tools=Path(__file__).resolve().parent
    )
    if arguments.finish:
        finish(plan, arguments.finish)
        return
    steps = plan.steps(arguments.until)
    if arguments.check:
        check(plan, steps)
    print("\n".join(as_text(steps, plan.run_dir)))


if __name__ == "__main__":
    cli.run(main)
