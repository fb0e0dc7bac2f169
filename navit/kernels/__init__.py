"""Pallas kernels for TPUs, and the CPU's gather of segments."""
