"""What a training run imports on its way, imported at once: processes that are forked afterwards share it.
It takes longer than the runs of the tests themselves.
"""

from contextlib import suppress

import torch._dynamo

with suppress(ImportError):
    import torch.utils.tensorboard  # noqa: F401 - by the first file of curves
