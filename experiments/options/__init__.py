"""What may be asked for, and what was: checked in a second, before the libraries that experiments need are imported.

`schema` has every option with its type, `reading` makes `Options` of what Hydra composed, `command_line` prepares what
was typed, `help` tells what there is. `masks`, `benchmark`, `table` and `training` fill in the paper's presets.
"""

from experiments.options.reading import compose_options, read_options
from experiments.options.schema import Options

__all__ = ["Options", "compose_options", "read_options"]
