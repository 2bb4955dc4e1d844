"""Features become a sequence, a sequence an embedding."""
