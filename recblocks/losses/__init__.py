"""What trains an embedding or a ranking."""
