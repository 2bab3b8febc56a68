"""One file for each figure of a report, with its drawing and its caption; they share `base`, `style`, `bars` and
`heat_maps`. May import `report.run`, `report.formatting` and what lies below.
"""
