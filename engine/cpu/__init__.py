"""What the processor does: walks, the access decision, translation caches. It reports exits and never handles one."""
