"""Reads, checks and tokenizes the data once; everything later works on its output."""

from megatron_spin import cli
from megatron_spin.commands.prepare import main

if __name__ == "__main__":
    cli.run(main)
