"""What the hypervisor did about a VM exit.

Up to ``LAST_INTERNAL`` the guest goes on with the same instruction and user space sees nothing.
"""

MAPPED = 0
ARMED = 1
FILLED = 2
RESTORED = 3
LAST_INTERNAL = RESTORED
VIOLATION = 4
MMIO = 5
INTERNAL_ERROR = 6
COMPLETED = 7

RESOLUTION_NAMES = (
    "mapped",
    "armed",
    "sppt-filled",
    "write-restored",
    "violation",
    "mmio",
    "internal-error",
    "completed",
)
