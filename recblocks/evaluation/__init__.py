"""How good embeddings and rankings are."""
