"""Records of the page: conversations, preferences, and a view of training runs."""
