"""What all experiments cost next to plain forward passes over the same prompts, on the embedded model and the CPU.

    python tests/benchmarks/whole_run.py

`python experiments/run.py exp=all` and a plain transformers model are run in processes of their own. Prints the time of
all cores together, which others on the machine change least, and the peak of resident memory. Exits with 1 if a ratio
is over its limit.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
TIME, MEMORY = 3.2, 1.25  # of the plain passes


def main() -> None:
    if sys.argv[1:] == ["plain"]:
        plain_passes()
        return
    with tempfile.TemporaryDirectory() as folder:
        options = ["exp=all", "exp.keep=false", f"hydra.run.dir={folder}"]
        whole = cost(str(ROOT / "experiments" / "run.py"), *options)
        plain = cost(__file__, "plain")
    table = Table("", "seconds of all cores", "peak resident memory")
    for name, (seconds, peak) in {"plain forward passes": plain, "exp=all": whole}.items():
        table.add_row(name, f"{seconds:.1f}", f"{peak / 2**20:,.0f} MiB")
    ratios = [own / of_plain for own, of_plain in zip(whole, plain, strict=True)]
    table.add_row(
        "ratio", *(f"{ratio:.2f} (at most {most})" for ratio, most in zip(ratios, (TIME, MEMORY), strict=True))
    )
    Console(width=110).print(table)
    sys.exit(not (ratios[0] <= TIME and ratios[1] <= MEMORY))


def cost(*arguments: str) -> tuple[float, int]:
    """Run a script in a process of its own; return its processor time in seconds and its peak memory in bytes."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(arguments)} ended with exit code {process.returncode}.")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


@torch.no_grad()
def plain_passes() -> None:
    """Load the model and run the project's prompts through it once, those of like length together."""
    import melens
    from melens.models.twins import plain_twin
    from melens.tracing.batching import BatchRule
    from melens.tracing.trace import as_tokens

    bridge = melens.load_model("smollm2-135m")
    network = plain_twin(bridge).base_model
    tokens = as_tokens(bridge, melens.load_prompts()).tokens
    for rows in BatchRule().groups(list(map(len, tokens)), max_batch_tokens=4096):
        padded = torch.nn.utils.rnn.pad_sequence([tokens[row] for row in rows], batch_first=True)
        network(input_ids=padded, use_cache=False)


if __name__ == "__main__":
    main()
