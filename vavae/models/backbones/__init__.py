"""Frozen pretrained networks: configuration, weights, loading and normalization of their images."""
