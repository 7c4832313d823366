"""Pretrained networks that are only looked through: where their weights come from, and how they are frozen."""
