"""Evaluations of embeddings, at any token budgets."""
