"""Texts → token ids: the reference tokenizers' pair encoding, with each query encoded once."""
