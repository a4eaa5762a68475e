"""One process of a run that is sharded as `accelerate launch` would shard it, on the CPU: runs of several options.

Accelerate shards on GPUs only; here its word for several CPU processes is replaced by the one for several GPUs.
"""

import json
import os
import sys

from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType

import train_perflow

init = PartialState.__init__


def as_on_gpus(self, *args, **kwargs) -> None:
    init(self, *args, **kwargs)
    if self._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = as_on_gpus
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # the first process keeps the store of each run, not the launcher
for port, words in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = str(port)  # a run ends its group of processes
    sys.argv = ["train_perflow.py", *words]
    train_perflow.main()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
