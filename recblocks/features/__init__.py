"""What one action, or one item, looks like to a model."""
