"""Ranks, collectives, engines and DeepSpeed; models and losses know none of them."""
