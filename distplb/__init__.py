"""distplb: keeps the GPUs of mixture-of-experts pretraining equally busy."""

from distplb.core.bound import lower_bound
from distplb.core.cost import imbalance
from distplb.core.layer import FlatShard, MoELayer
from distplb.core.placement import Placement
from distplb.core.price import MoveModel, TimeCurve
from distplb.core.topology import Topology
from distplb.errors import DistplbError
from distplb.packing.balanced_packing import balanced_packing
from distplb.planning.eplb import rebalance_experts
from distplb.planning.plan import plan
from distplb.records.event_log import EventLog
from distplb.records.events import RebalanceEvent
from distplb.records.read_log import read_events, read_steps
from distplb.records.step_event import StepEvent
from distplb.records.trace import Trace
from distplb.records.trace_writer import TraceWriter
from distplb.replicas.step_balancer import StepBalancer
from distplb.splitting.bound import step_bound
from distplb.splitting.routes import routes
from distplb.splitting.split import split
from distplb.splitting.split_value import Split
from distplb.study.replay import replay
from distplb.train.measure import measured_curve
from distplb.train.options import Moves, Record, Search, Spread
from distplb.train.rebalancer import Rebalancer
from distplb.train.window import LoadWindow

__all__ = [
    "DistplbError",
    "EventLog",
    "FlatShard",
    "LoadWindow",
    "MoELayer",
    "MoveModel",
    "Moves",
    "Placement",
    "RebalanceEvent",
    "Rebalancer",
    "Record",
    "Search",
    "Split",
    "Spread",
    "StepBalancer",
    "StepEvent",
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
    "read_steps",
    "rebalance_experts",
    "replay",
    "routes",
    "split",
    "step_bound",
]

__version__ = "0.1.0"
