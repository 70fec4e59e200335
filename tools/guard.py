"""Judges whether an iteration is fit to become the opponent."""

from megatron_spin import cli
from megatron_spin.commands.guard import main

if __name__ == "__main__":
    cli.run(main)
