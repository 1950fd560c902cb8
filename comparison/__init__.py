"""The same training by PyTorch Lightning, and what the two have in common.

Lightning imports matplotlib, which some settings of its user would stop: ours comes first.
"""

import transformer_scratch.own_matplotlib  # noqa: F401
