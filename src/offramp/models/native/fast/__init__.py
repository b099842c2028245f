"""Fast steps of the native decoder, with compiled kernels or with PyTorch."""
