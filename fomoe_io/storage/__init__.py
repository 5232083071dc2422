"""Files: GGUF, the store, and the readers of both."""
