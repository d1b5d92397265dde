"""The public names, and where each is defined; `__init__.py` loads them from here."""

from taskgrad.chain import GraphChain as GraphChain
from taskgrad.cluster.local import local_cluster as local_cluster
from taskgrad.errors import (
    CheckpointError as CheckpointError,
)
from taskgrad.errors import (
    ClusterMismatchError as ClusterMismatchError,
)
from taskgrad.errors import (
    CollectiveError as CollectiveError,
)
from taskgrad.errors import (
    CotangentError as CotangentError,
)
from taskgrad.errors import (
    DerivativeError as DerivativeError,
)
from taskgrad.errors import (
    LayerError as LayerError,
)
from taskgrad.errors import (
    MemoryLimitError as MemoryLimitError,
)
from taskgrad.errors import (
    PlacementError as PlacementError,
)
from taskgrad.errors import (
    TapeError as TapeError,
)
from taskgrad.errors import (
    TaskgradError as TaskgradError,
)
from taskgrad.errors import (
    TravelError as TravelError,
)
from taskgrad.errors import (
    WorkerLostError as WorkerLostError,
)
from taskgrad.formats.weights import load_state_dict as load_state_dict
from taskgrad.graph.parallel import Parallel as Parallel
from taskgrad.kernels.function import Elementwise as Elementwise
from taskgrad.kernels.function import fuse as fuse
from taskgrad.kernels.function import vectorize as vectorize
from taskgrad.launch.main import main as main
from taskgrad.launch.main import rank as rank
from taskgrad.launch.main import size as size
from taskgrad.mapping.api import map as map
from taskgrad.pullbacks import vjp as vjp
from taskgrad.spmd.collectives import axis_index as axis_index
from taskgrad.spmd.collectives import axis_size as axis_size
from taskgrad.spmd.collectives import pmax as pmax
from taskgrad.spmd.collectives import pmean as pmean
from taskgrad.spmd.collectives import pmin as pmin
from taskgrad.spmd.collectives import psum as psum
from taskgrad.spmd.exchanges import all_gather as all_gather
from taskgrad.spmd.exchanges import all_to_all as all_to_all
from taskgrad.spmd.exchanges import pbroadcast as pbroadcast
from taskgrad.spmd.exchanges import ppermute as ppermute
from taskgrad.spmd.exchanges import pshuffle as pshuffle
from taskgrad.spmd.exchanges import psum_scatter as psum_scatter
from taskgrad.spmd.exchanges import pswapaxes as pswapaxes
from taskgrad.spmd.pmap import pmap as pmap
from taskgrad.spmd.sharded.api import load_sharded as load_sharded
from taskgrad.spmd.sharded.api import shard as shard
from taskgrad.spmd.sharded.layout import Sharded as Sharded
from taskgrad.spmd.sharded.tensor import ShardedTensor as ShardedTensor
from taskgrad.streaming.imap import imap as imap
from taskgrad.streaming.imap import starmap as starmap
from taskgrad.thunk import Thunk as Thunk
from taskgrad.thunk import collect as collect
from taskgrad.thunk import spawn as spawn
from taskgrad.train.callbacks.base import Callback as Callback
from taskgrad.train.callbacks.csv_logger import CSVLogger as CSVLogger
from taskgrad.train.callbacks.early_stopping import EarlyStopping as EarlyStopping
from taskgrad.train.callbacks.ema import EMA as EMA
from taskgrad.train.callbacks.learning_rates import LearningRateMonitor as LearningRateMonitor
from taskgrad.train.callbacks.model_checkpoint import ModelCheckpoint as ModelCheckpoint
from taskgrad.train.callbacks.tensorboard_logger import TensorBoardLogger as TensorBoardLogger
from taskgrad.train.optimizer import Optimizer as Optimizer
from taskgrad.train.trainer import Trainer as Trainer
from taskgrad.worker.randomness import random_stream as random_stream

__version__: str
