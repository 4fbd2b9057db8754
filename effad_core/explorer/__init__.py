"""ThresholdExplorer: choose an operating point by looking; arrays in, knows no torch."""

from .widget import ThresholdExplorer

__all__ = ["ThresholdExplorer"]
