"""Text to tokens: the pair encoding of the reference tokenizers, the query encoded once."""
