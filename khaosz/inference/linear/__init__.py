"""How weights multiply: dense, packed, or as GGUF blocks."""
