"""Losses over the packed batch; each counts only real images."""
