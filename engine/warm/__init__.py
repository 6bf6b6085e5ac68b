"""Compile and load kernels before somebody waits for them: ``python -m engine.warm``."""
