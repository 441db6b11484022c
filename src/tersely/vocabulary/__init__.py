"""The tokens of a model: fewer, more, or those of another tokenizer."""
