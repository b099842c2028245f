"""Fast steps of the native decoder: compiled kernels, or PyTorch's products without them."""
