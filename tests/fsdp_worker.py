"""Run a script as under an Accelerate configuration with FSDP, which Accelerate itself grants on accelerators only."""

import runpy
import sys

from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


Accelerator()
for state in (PartialState, AcceleratorState):
    state._shared_state["distributed_type"] = DistributedType.FSDP
AcceleratorState().fsdp_plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2,
    auto_wrap_policy="transformer_based_wrap",
    transformer_cls_names_to_wrap=["TestaVideoLayer", "TestaTextLayer"],
    state_dict_type="SHARDED_STATE_DICT",
    cpu_ram_efficient_loading=False,
)
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
