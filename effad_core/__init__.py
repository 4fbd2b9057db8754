"""EfficientAD step by step: the networks, algorithms and metrics of the paper, and its data."""

from effad_core.acceleration.threads import settle_threads
from effad_core.cli import own_version

import lazy_loader

settle_threads()  # before any module of the package loads torch

# `__init__.pyi` says which module has which public name. A module is loaded when a name of it is
# first used: importing the package is quick, and a part whose extra is missing harms no other.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = own_version()
