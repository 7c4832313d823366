"""From noise and labels to images: both exported models, guidance and a solver."""
