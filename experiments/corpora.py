"""The texts that studies share, from packages that their own clients download."""

from __future__ import annotations

from examples.demo_data import load_demo_data, read_wheel

__all__ = ["load_demo_data", "read_wheel"]
