"""Tasks in words, batched."""
