"""Completes an iteration or a baseline."""

from megatron_spin import cli
from megatron_spin.commands.rotate import main

if __name__ == "__main__":
    cli.run(main)
