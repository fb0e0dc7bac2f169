"""The training loop and what it needs: state, step, checkpoint, metrics."""
