"""Models by name: the catalogue, where they come from, and what is on this machine already."""
