"""One file per resource: its routes and its models."""
