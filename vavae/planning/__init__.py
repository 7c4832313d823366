"""Estimates of what a run takes on a cluster, before there is one: time, money, bytes, bottlenecks."""
