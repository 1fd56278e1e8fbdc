"""Every operation of a forward pass behind one interface.

`interface` declares the operations and the records they read; `reference` is their specification in plain torch;
`native` is the CPU implementation in C++. `select` chooses between them.
"""
