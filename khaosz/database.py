"""One way to open SQLite and to run a transaction."""
