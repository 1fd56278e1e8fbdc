"""One replica on one device: a pure scheduler, kernels, model definitions, and the loop that joins them."""
