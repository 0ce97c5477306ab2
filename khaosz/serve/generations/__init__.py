"""Answers that belong to the server: generated and stored whether a client reads them or not.
`store` keeps them in the database of conversations, `growing` generates them, `routes` lists,
reads, stops and continues them."""
