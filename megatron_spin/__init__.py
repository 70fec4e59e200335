"""SPIN (Self-Play fIne-tuNing, arXiv 2401.01335) as a Megatron-Core training backend."""

__version__ = "0.1.0"
