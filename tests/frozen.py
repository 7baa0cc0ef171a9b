"""What was imported is left alone by later collections of garbage.

Each training run ends with one, which would look through the million objects that imports leave, for longer than a tiny
model trains. The process that is forked from imports this last, for its children.
"""

import gc


def freeze() -> None:
    """Clear garbage away and leave all else that is there alone."""
    gc.collect()
    gc.freeze()


freeze()
