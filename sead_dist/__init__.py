"""Distil an ensemble of N teachers into one small student for language understanding."""

__version__ = "0.1.0"
