"""How a graph, a plan, a table look."""
