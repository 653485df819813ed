"""Modules: Mamba blocks with the parameters of mamba-ssm, and the layers the models put around them."""

from recbole_holo.layers.dropout import Dropout
from recbole_holo.layers.init import SSM_INITS, initialise_ssm
from recbole_holo.layers.mamba import Mamba
from recbole_holo.layers.mamba2 import LatentMamba2, Mamba2

__all__ = ["SSM_INITS", "Dropout", "LatentMamba2", "Mamba", "Mamba2", "initialise_ssm"]
