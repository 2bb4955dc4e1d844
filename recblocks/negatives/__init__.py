"""Which items a loss compares with, and how likely each was to be drawn."""
