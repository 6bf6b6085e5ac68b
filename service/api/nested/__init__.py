"""Nested state and the enlightened VMCS."""
