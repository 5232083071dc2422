"""fomoe-serve: a model behind HTTP, in the dialects of llama-server, OpenAI and Anthropic (docs/server.md)."""
