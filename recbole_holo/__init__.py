"""State space models for sequential recommendation, as an extension of RecBole 1.2.

Importing the package refuses library versions that would corrupt results silently, and applies the shims that let
RecBole 1.2 run on current numpy, scipy and hyperopt (:mod:`recbole_holo.bridge.compat`). Nothing heavy is imported
here: torch, RecBole and the models come in with the modules that use them.

Raises:
    ImportError: RecBole or pandas is missing or of a version that does not work; the message says what to install.
"""

import sys

from recbole_holo.bridge import compat

__version__ = "0.1.0"

# The doctor is for the environment that is broken, so it alone may be started there: it reports what check() raises.
if "recbole_holo.doctor" not in sys.orig_argv:
    compat.check()
compat.apply_shims()
