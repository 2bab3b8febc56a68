"""`python -m distplb`, also under torchrun: `torchrun --nproc-per-node 2 -m distplb doctor`."""

from __future__ import annotations

from distplb.cli.main import main

__all__: list[str] = []

if __name__ == "__main__":
    main(prog_name="distplb")
