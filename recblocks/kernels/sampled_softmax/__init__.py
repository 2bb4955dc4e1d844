"""Backends of the sampled softmax loss."""
