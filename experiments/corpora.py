"""The texts that studies share, from packages that their own clients download."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

from demo_data import load_demo_data, read_wheel

__all__ = ["load_demo_data", "read_wheel"]
