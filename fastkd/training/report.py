"""The former name of ``python -m fastkd.report``, for one release more."""

import runpy

if __name__ == "__main__":
    runpy.run_module("fastkd.report", run_name="__main__")
