"""Write footprints: a trace reduced to the places that it accesses, and what any policy costs there."""
