"""From the public downloads of KuaiRand and LFM-1b to RecBole's atomic files, in bounded memory.

``python -m recbole_holo.data.prepare kuairand RAW_DIR OUT_DIR``, or from Python::

    from recbole_holo.data.prepare import Options, convert, kuairand

    print(convert(kuairand.source("KuaiRand-1K"), "dataset", Options(k_core=5)))
"""

from recbole_holo.data.prepare import kuairand, lfm1b
from recbole_holo.data.prepare.conversion import Options, Report, Source, convert

__all__ = ["Options", "Report", "Source", "convert", "kuairand", "lfm1b"]
