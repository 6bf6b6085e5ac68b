"""A real guest: what the tutorial captures, made small for the tests, and the long run that captures it anew."""
