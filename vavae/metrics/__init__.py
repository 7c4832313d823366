"""How good images are: Fréchet distance, reconstruction, class agreement. Extractor, float64 sums, closed formula."""
