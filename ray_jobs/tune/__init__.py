"""A sweep under Ray Tune: search, callbacks and the tasks that trials share."""
