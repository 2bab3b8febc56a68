"""What a job leaves behind, events and traces; and in `foreign`, what other programs leave. May import `core`."""
