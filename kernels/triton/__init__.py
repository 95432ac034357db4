"""The kernels in Triton, each with a twin in `kernels.torch`."""
