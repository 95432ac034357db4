"""The kernels in plain torch: the reference for those in Triton, and what runs where there is no Triton."""
