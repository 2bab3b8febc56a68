"""distplb: keeps the GPUs of mixture-of-experts pretraining equally busy."""

from distplb.bound import lower_bound
from distplb.cost import imbalance
from distplb.errors import DistplbError
from distplb.layer import FlatShard, MoELayer
from distplb.load import LoadWindow
from distplb.packing.balanced import balanced_packing
from distplb.placement import Placement
from distplb.planner import plan
from distplb.planning.eplb import rebalance_experts
from distplb.rebalancer import Rebalancer
from distplb.topology import Topology

__all__ = [
    "DistplbError",
    "FlatShard",
    "LoadWindow",
    "MoELayer",
    "Placement",
    "Rebalancer",
    "Topology",
    "balanced_packing",
    "imbalance",
    "lower_bound",
    "plan",
    "rebalance_experts",
]

__version__ = "0.1.0"
