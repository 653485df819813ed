"""``python run_recbole_holo.py --model=HoloMambaRec --dataset=ml-1m``; ``--help`` lists the flags."""

import sys

from recbole_holo.cli import main

if __name__ == "__main__":
    sys.exit(main())
