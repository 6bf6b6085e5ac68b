"""Guest accesses as columns: the formats people have, replay, and what came of it."""
