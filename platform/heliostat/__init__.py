"""Heliostat: deep models through their whole life on one Ray cluster."""

__version__ = "0.1.0"
