"""VA-VAE tokenizers and LightningDiT: aligned latent spaces and the diffusion transformers trained on them."""
