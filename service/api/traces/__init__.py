"""Accesses: one, or a trace of them; results, exits, jobs."""
