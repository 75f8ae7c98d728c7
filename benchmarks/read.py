"""Shuffled reading: this cache beside one safetensors file a document and beside one flat np.memmap, same data.

    python -m benchmarks.read [--features int8] [--documents 2000] [--tokens 160] [--hidden 576] ...

Documents are made up, with the shape and the redundancy of a language model's: what matters is bytes and layout. All three
are read whole, in a shuffled order, in this process, with the page cache warm; rounds of the three alternate, and each
reading gives the training loop's arrays: tokens, mask, rows, top-k ids and log-probs as int64 and float32, features in
float32. Ends with one JSON line.
"""
