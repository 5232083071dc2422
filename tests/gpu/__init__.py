"""Tests that need a card (pytest -m gpu)."""
