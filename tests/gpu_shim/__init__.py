"""The GPU kernels on the CPU, and the checks that every way of running them must pass."""
