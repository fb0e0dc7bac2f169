"""Compiles a training step for a TPU that is not there, and reports its cost."""
