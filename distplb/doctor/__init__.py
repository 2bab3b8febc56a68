"""What `distplb doctor` looks at: this process, and then all ranks together. May import `train` and what lies below."""
