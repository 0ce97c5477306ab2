"""The tokenizer, its chat template, and how text becomes token ids."""

from khaosz.data.tokenizer.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

__all__ = ["Tokenizer", "load_tokenizer", "train_tokenizer"]
