"""Moving experts: bandwidth, memory, preparation."""
