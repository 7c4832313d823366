"""Rows of metrics of a training: where its time went, what each metric means, and where rows are kept."""
