"""A page to play with a trained run."""
