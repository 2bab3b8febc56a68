"""The adapters, each in its framework."""
