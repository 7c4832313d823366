"""The jobs: one thin module each, run as ``python -m ray_jobs.<name>``. The only package that imports Ray."""
