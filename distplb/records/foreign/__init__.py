"""Files that other programs wrote: which part of them is counts, and what the counts are. May import `core`."""
