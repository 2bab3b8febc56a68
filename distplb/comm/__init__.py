"""The only folder that knows a communication library. May import `core`; knows nothing of planning."""
