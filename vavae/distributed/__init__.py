"""Everything that knows ranks, collectives and DeepSpeed; models and losses never do."""
