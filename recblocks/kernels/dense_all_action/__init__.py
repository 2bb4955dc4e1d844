"""Backends of the dense all-action loss: positives that are columns of the pool."""
