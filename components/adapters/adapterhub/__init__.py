"""Adapters of the AdapterHub library (`adapters`), read and written: https://docs.adapterhub.ml."""

from components.adapters.adapterhub.reading import load
from components.adapters.adapterhub.writing import save

__all__ = ["load", "save"]
