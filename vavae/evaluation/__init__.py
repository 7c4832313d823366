"""Measures of a whole run: reconstruction, alignment, generation."""
