"""The losses of the tokenizer, as functions of tensors: reconstruction, alignment, adversary, and their balance."""
