"""Backends of the log-periodic time encoding."""
