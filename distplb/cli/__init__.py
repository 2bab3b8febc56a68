"""The command line: `main`, one file per command, and what commands share: `shared_options`, `param_types`,
`plan_request`, `output` and others. May import everything.
"""
