"""Experts: which are where, which are kept, which stand in for others."""
