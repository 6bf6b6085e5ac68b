"""Random ioctl sequences against the binary ABI of a machine and against a second model of the kernels.

The model is written from the sources that the documents name, without the engine's: two readings of one text. `make
differential` runs many sequences; ``test_differential.py`` some.
"""
