"""Compiles a training step for TPUs or GPUs that are not there; reports its cost."""
