"""Plans which image goes where, at which grid: integers only."""
