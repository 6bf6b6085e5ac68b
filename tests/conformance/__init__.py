"""Differential conformance: the engine against the processor model of Debian's Bochs, an implementation not ours.

``generate`` makes vectors (``edges`` and random ones, both from ``draft``) on the memory of ``layout``; ``bochs`` runs
them on a bare-metal hypervisor of our own (``guest/``) under Bochs, ``engine_side`` in the engine; ``compare`` finds
differences, ``exclusions`` knows Bochs' faults, ``tally`` counts. One run is one seed: ``SEED=7``, or ``SEEDS=50`` of
them in a row, in the environment of ``pytest tests/conformance``.
"""
