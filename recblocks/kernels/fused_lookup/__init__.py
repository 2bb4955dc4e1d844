"""Backends of the fused embedding lookup."""
