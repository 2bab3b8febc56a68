"""The checks of `distplb doctor`: this process, then all ranks together. May import `train` and the rooms below it."""
