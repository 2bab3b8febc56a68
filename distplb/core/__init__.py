"""The values that all rooms work on: topology, placements, counts, costs, prices, bounds. May import only `errors`."""
