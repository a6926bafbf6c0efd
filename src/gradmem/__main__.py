"""`python -m gradmem`."""

import os
import sys

from .plugins import installed

sys.path[:] = installed(sys.path)  # before anything else is imported

from .cli.main import main  # noqa: E402

code = main()
if "RANK" in os.environ:
    # Python's own exit, with threads of gloo still there, aborted one in eight runs of two processes.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
sys.exit(code)
