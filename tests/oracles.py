"""Definitions as scalar loops over Python numbers. Nothing here imports recblocks, and nothing here is fast."""
