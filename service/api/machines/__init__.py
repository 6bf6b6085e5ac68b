"""Machines: made, listed, read, deleted; their capabilities and counters."""
