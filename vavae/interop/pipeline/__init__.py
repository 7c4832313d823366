"""Modules that a pipeline folder for diffusers carries, to be run where this package is not installed."""
