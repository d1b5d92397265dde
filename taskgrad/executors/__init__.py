"""Run a graph of calls on a cluster."""
