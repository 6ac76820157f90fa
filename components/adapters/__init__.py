"""Adapters as PEFT methods. Importing this package registers the methods "BOTTLENECK" and "BITFIT" with PEFT."""

from components.adapters.bitfit import BitFitConfig
from components.adapters.config import METHODS, BottleneckConfig
from components.adapters.model import BottleneckModel

__all__ = ["METHODS", "BitFitConfig", "BottleneckConfig", "BottleneckModel"]
