"""The command line under FSDP2 on the CPU, which accelerate offers on accelerators alone: here it is told otherwise."""

import runpy
import sys
from pathlib import Path

from accelerate import state
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

ROOT = Path(__file__).parents[1]
of_accelerate = state.AcceleratorState.__init__


def begin(self, *args, fsdp_plugin=None, **options):
    of_accelerate(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if self.__dict__.get("distributed_type") == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin or FullyShardedDataParallelPlugin()
        if self._mixed_precision != "no":
            self.fsdp_plugin.set_mixed_precision(self._mixed_precision)


if __name__ == "__main__":
    state.AcceleratorState.__init__ = begin
    sys.path.insert(0, str(ROOT))
    sys.argv[0] = str(ROOT / "experiments" / "run.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
