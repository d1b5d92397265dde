"""A map that torch differentiates: over processes, threads, or both."""
