"""What a worker's process runs."""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
from worker import talk  # noqa: E402

del sys.path[0]  # libraries have modules of these names, too
talk.main()
