"""Pallas kernels for TPUs, and the gather of segments for CPUs."""
