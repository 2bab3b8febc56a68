"""What records cost."""
