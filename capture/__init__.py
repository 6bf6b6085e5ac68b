"""Recording real guests: a plugin of QEMU that sees every store, and the reader of what it sees.

Knows nothing of machines and of the service: records of stores go from shared memory to whoever iterates over them.
"""
