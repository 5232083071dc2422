"""The machine: files, memory, what it is."""
