"""The only folder that knows a communication library. Knows nothing of planning."""
