"""Speed, measured: every row checks its results before it is timed."""
