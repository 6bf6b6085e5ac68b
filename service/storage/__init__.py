"""Durable state: machines, their blocks and the results of their replays, in SQLite or PostgreSQL."""
