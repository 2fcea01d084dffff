"""Which code runs: one readable reference per operation, fast kernels beside it, one table."""
