"""Products with quantised matrices: our C++ on a file as it lies, and PyTorch's own kernels."""
