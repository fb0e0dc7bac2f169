"""Which image goes where, at which grid: integers only."""
