"""Packed bytes: lossless codecs for weights in memory, what packed bytes look like, and when packing pays."""
