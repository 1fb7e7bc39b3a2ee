"""The seed of this session's inputs. In a module of its own: pytest imports conftest.py under one name, and a
test would under another.
"""

from __future__ import annotations

import os
import random

SEED = int(os.environ.get("FASTKD_TEST_SEED") or random.SystemRandom().randrange(2**31))
