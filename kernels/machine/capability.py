"""What graphics cards can do by their compute capability. The one module of this package that plans rest on too: it
imports nothing."""

OLDEST = (8, 0)  # that Triton needs, and the first with tensor cores for bfloat16 and int8
FLOAT8 = (8, 9)  # the first with tensor cores for float8
FLOAT16_SUMS = ((7, 5), (8, 6), (8, 9), (12, 0))  # tensor cores sum in float16 at twice the rate: RTX 2000 to 5000
