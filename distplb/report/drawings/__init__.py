"""One file for each figure of a report, which draws it and says what to see in it; `base`, `style`, `bars` and
`heat_maps` are what they share. May import `report.run`, `report.formatting` and what lies below.
"""
