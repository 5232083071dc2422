"""Mutated inputs, thousands of them, from seeds: every one is refused in one line or runs (tests/fuzz/test_fuzz.py)."""
