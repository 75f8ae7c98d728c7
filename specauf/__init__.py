"""specauf: train speculative-decoding drafters from an offline cache of the target's features and sparse logits."""

from specauf.threads import share_cores

__version__ = "0.1.0"

share_cores()  # here, for torch starts its threads as it is imported: by commands, studies or a program of the user's
