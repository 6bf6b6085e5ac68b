"""What the service holds under load: several long replays, and short calls that arrive whether or not it keeps up."""
