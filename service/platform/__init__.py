"""What the service asks of the machine that it runs on: files, time, and the messages of what it refuses."""
