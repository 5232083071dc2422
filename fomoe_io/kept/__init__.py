"""What sessions have read, kept: pieces of prompts in memory and on a drive, so that none is read a second time."""
