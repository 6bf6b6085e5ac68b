"""Where machines live: the registry, one writer per machine, request bodies as files, results of replays."""
