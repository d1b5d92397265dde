"""One program on many workers: a parallel map with a named axis, and collectives over it."""
