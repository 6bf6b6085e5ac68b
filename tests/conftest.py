"""What holds for every test: machines live in memory unless a test says where else."""

from __future__ import annotations

import os

os.environ["SUBPAGE_STORE"] = "memory"
