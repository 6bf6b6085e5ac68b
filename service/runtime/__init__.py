"""Where machines live: the registry, one lock per machine, request bodies as files, results of replays."""
