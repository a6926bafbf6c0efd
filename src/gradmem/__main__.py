"""`python -m gradmem`."""

import sys

from .cli import main

sys.exit(main())
