"""The operations of a forward pass on a GPU, in Triton. Only this package imports triton."""
