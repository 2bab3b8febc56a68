"""Load and topology in, placement out. Pure: no process group, no clock, no file, no global random state."""
