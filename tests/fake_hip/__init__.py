"""A double of the HIP runtime."""
