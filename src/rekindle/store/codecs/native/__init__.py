"""C++ source of the byte planes and of Huffman-only DEFLATE; `rekindle.store.codecs.native_planes` calls it."""
