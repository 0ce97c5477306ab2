"""Alignment and embedding: strategies, losses and validation of each stage."""
