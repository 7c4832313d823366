"""Experiment trackers: rows, pictures and final metrics of a job in TensorBoard, W&B, MLflow or trackio."""
