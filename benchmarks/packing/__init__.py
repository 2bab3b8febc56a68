"""The packing core."""
