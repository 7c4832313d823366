"""LightningDiT: a diffusion transformer on latents, plain single-device code under the published parameter names."""
