"""Flow matching between noise (t = 0) and data (t = 1): path, timesteps, objective, guidance and solvers."""
