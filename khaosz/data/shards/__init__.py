"""Memory-mapped token files and how they are prepared."""
