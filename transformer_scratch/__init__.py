"""A Transformer and everything its training loop needs, written from scratch in plain PyTorch."""

import os
import sys

# OpenMP reads this once, while PyTorch is loaded. At the end of every operation its threads wait
# for the slowest. By default they spin meanwhile, and where another program is busy they spin away
# the time that the slowest needs; asleep, they leave it to it (python -m benchmarks.threads).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

try:
    import torch  # noqa: F401
except ValueError as error:  # PyTorch and tqdm read their variables as they are imported
    variables = [name for name in os.environ if name.startswith(("TORCH", "PYTORCH", "TQDM"))]
    if not variables:
        raise
    print(
        f"error: PyTorch cannot be imported: {str(error).strip().splitlines()[0]}. "
        f"Change or unset {' or '.join(variables)}",
        file=sys.stderr,
    )
    sys.exit(2)
