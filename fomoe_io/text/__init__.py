"""Text: tokens, templates, sampling, generation."""
