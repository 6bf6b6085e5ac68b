"""Work on many traces, spread over processes or over a cluster: sources in, one footprint out. Knows the engine."""
