"""specauf: train speculative-decoding drafters from an offline cache of the target's features and sparse logits."""

__version__ = "0.1.0"
