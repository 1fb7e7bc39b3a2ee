"""``python -m fastkd.report FOLDER``: see :mod:`fastkd.report.tables`."""

import sys

from fastkd.report.tables import main

sys.exit(main())
