"""Loads the machine code of engine `cpu` as it is imported: by the fork server of `ranks`, for all its children."""

from __future__ import annotations

from distplb.packing import cpu

if cpu.is_there():
    cpu.warm_up()
