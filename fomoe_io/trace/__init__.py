"""Traces of routing, and their replay."""
