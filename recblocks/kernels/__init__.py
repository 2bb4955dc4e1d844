"""Fast backends, one folder an op; the readable reference of each stands with its block."""
