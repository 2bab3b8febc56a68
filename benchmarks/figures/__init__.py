"""Only drawing: one figure for each benchmark that has one."""
