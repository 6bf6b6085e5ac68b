"""Names of guest memory: files of symbols read into one table, looked up by name and address, placed in memory."""
