"""``python -m fastkd.report FOLDER``: see :mod:`fastkd.report.command`."""

import sys

from fastkd.report.command import main

sys.exit(main())
