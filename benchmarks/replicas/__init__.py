"""What replicas cost a training step, and what they gain."""
