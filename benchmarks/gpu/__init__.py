"""What one GPU does with the code as it is: checks, speed and training, each within minutes.

`python -m benchmarks.gpu check | speed | train`, from a checkout. Needs PyTorch, transformers, Accelerate and what
they bring; nothing of the command line's packages, no installation and no network. Every part has a time limit, prints
what it does, and writes JSON and CSV into one folder.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
if str(ROOT / "src") not in sys.path:
    sys.path.insert(0, str(ROOT / "src"))
