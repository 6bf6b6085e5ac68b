"""Faults put into the engine one at a time, to see that the tests notice: `make mutants`.

One module per package of the engine holds its list; ``__main__`` runs them all.
"""
