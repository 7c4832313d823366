"""The machinery that all jobs share: command line, cluster, workers, actors, progress and metrics."""
