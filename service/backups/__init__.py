"""Machines as files: what a backup holds, what is refused of one, and the commands that write and read it."""
