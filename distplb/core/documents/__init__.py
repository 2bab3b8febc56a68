"""Files of other people, as lists, objects and arrays: sizes are checked before memory is taken, nothing is run."""
