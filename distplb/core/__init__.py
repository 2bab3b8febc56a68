"""What everything is said in: topology, placements, counts, costs, prices, bounds. May import only `errors`."""
