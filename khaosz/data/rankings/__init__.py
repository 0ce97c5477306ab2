"""Rankings of several annotators: their files, their agreement, and what training gets."""
