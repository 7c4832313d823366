"""The VA-VAE: encoder, decoder, posterior; the vision foundation teacher; the normalizer of its latents."""
