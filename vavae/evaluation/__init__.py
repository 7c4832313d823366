"""Evaluation of a run: reconstruction, alignment, generation, latent space."""
