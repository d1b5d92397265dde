"""One function over many items: a differentiable map, streaming maps, and their start under MPI."""
