"""What the README claims, as commands."""

import transformer_scratch  # noqa: F401 - before torch: it decides how threads wait
