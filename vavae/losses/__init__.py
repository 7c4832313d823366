"""Losses of the tokenizer, as functions of tensors: reconstruction, alignment, adversary, adaptive weights."""
