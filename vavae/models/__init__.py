"""The networks: pretrained backbones, the tokenizer and the diffusion transformer."""
