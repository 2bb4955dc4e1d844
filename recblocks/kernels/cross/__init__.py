"""Backends of a layer of the cross network."""
