"""The console: what the service shows people in a browser."""
