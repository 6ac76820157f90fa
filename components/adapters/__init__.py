"""Adapters as PEFT methods. Importing this package registers the method "BOTTLENECK" with PEFT."""

from components.adapters.config import METHODS, BottleneckConfig
from components.adapters.model import BottleneckModel, register

register()

__all__ = ["METHODS", "BottleneckConfig", "BottleneckModel"]
