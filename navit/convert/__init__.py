"""Reads and writes released weights."""
