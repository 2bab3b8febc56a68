"""Loads the machine code of the `cpu` engines when imported; the fork server of `ranks` does so for its children."""

from __future__ import annotations

import torch

from distplb.core.topology import Topology
from distplb.packing import cpu
from distplb.splitting.routes import exchange_of
from distplb.splitting.split import split

if cpu.is_there():
    cpu.warm_up()
    exchange_of(split([[8, 1], [8, 1]], [0, 1], topology=Topology(1, 2)), Topology(1, 2), 0, torch.tensor([[0], [1]]))
