"""``python -m recbole_holo`` is the same command as ``run_recbole_holo.py``."""

import sys

from recbole_holo.cli import main

sys.exit(main())
