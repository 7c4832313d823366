"""Metrics of images and latents: Fréchet distance, precision and recall, reconstruction, class agreement."""
