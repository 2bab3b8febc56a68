"""What is measured, in the rooms of distplb; each file is run as a module from the root of the checkout."""
