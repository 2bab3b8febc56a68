"""Loads the machine code of engine `cpu` when imported; the fork server of `ranks` does so for all its children."""

from __future__ import annotations

from distplb.packing import cpu

if cpu.is_there():
    cpu.warm_up()
