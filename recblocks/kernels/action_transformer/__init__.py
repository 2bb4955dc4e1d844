"""Backends of TransAct's encoder."""
