"""Backends of the count-min sketch."""
