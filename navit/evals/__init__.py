"""Evaluations over embeddings, and over token budgets."""
