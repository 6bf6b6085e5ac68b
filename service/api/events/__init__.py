"""Events of a machine, and the tools that answer them."""
