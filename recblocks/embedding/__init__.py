"""Raw 64-bit ids to rows, and rows to vectors."""
