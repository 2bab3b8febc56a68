"""Loads the machine code of engine `cpu`; for the fork server of `ranks`, whose children then have it."""

from __future__ import annotations

from importlib.util import find_spec

from distplb.packing import cpu

if find_spec("numba"):
    cpu.warm_up()
