"""distplb: keeps the GPUs of mixture-of-experts pretraining equally busy."""

from distplb.bound import lower_bound
from distplb.cost import imbalance
from distplb.errors import DistplbError
from distplb.eventlog import EventLog, read_events
from distplb.events import RebalanceEvent
from distplb.layer import FlatShard, MoELayer
from distplb.load import LoadWindow
from distplb.measure import measured_curve
from distplb.packing.balanced import balanced_packing
from distplb.placement import Placement
from distplb.planner import plan
from distplb.planning.eplb import rebalance_experts
from distplb.price import MoveModel, TimeCurve
from distplb.rebalancer import Rebalancer
from distplb.replay import replay
from distplb.spread import Spread
from distplb.topology import Topology
from distplb.traces.trace import Trace
from distplb.traces.writer import TraceWriter

__all__ = [
    "DistplbError",
    "EventLog",
    "FlatShard",
    "LoadWindow",
    "MoELayer",
    "MoveModel",
    "Placement",
    "RebalanceEvent",
    "Rebalancer",
    "Spread",
    "TimeCurve",
    "Topology",
    "Trace",
    "TraceWriter",
    "balanced_packing",
    "imbalance",
    "lower_bound",
    "measured_curve",
    "plan",
    "read_events",
    "rebalance_experts",
    "replay",
]

__version__ = "0.1.0"
