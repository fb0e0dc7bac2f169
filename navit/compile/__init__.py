"""The training step compiled for a TPU that is not there, and what that tells."""
