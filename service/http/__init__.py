"""Conventions that every route shares: numbers, media types, validators, cursors, limits, errors."""
