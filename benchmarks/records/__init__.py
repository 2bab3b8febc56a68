"""The cost of records."""
