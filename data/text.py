"""Captions as the text tower of SigLIP 2 was trained to read them; the tower itself says how."""

from tokenizer.text.clean import clean_caption

__all__ = ["clean_caption"]
