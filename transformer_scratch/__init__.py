"""A Transformer and everything its training loop needs, written from scratch in plain PyTorch."""

import os
import sys

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
