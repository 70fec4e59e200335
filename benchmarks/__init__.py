"""Speed of a training step against TRL and against plain PyTorch written by hand; see docs/performance.md."""
