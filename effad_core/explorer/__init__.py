"""ThresholdExplorer: choose an operating point by looking; arrays in, knows no torch."""

from effad_core.errors import not_installed

try:
    from .widget import ThresholdExplorer
except ModuleNotFoundError as error:
    if error.name != "ipywidgets":
        raise
    raise ImportError(not_installed("ThresholdExplorer", "ipywidgets", "course")) from None

__all__ = ["ThresholdExplorer"]
