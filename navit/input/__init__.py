"""The host's side: image sizes to packed batches. Imports neither jax nor model."""
