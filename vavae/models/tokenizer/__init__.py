"""The VA-VAE: encoder, decoder, posterior; the vision foundation teacher; the normaliser of its latents."""
