"""Footprints: traces reduced to their places, what is there, and what policies cost there."""
