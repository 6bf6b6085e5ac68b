"""What the hypervisor did about a VM exit.

Up to ``LAST_INTERNAL`` the guest goes on with the same instruction and user space sees nothing.
"""

MAPPED = 0
ARMED = 1
FILLED = 2
RESTORED = 3
LOG_EMPTIED = 4
LAST_INTERNAL = LOG_EMPTIED
VIOLATION = 5
MMIO = 6
INTERNAL_ERROR = 7
COMPLETED = 8
EXCEPTION = 9  # no VM exit: the guest takes an exception of its own
RUN_FAILED = 10  # KVM_RUN itself fails

# Set beside a resolution: a cached translation decided, and the tables would have given another answer.
STALE = 1 << 8

RESOLUTION_NAMES = (
    "mapped",
    "armed",
    "sppt-filled",
    "write-restored",
    "log-emptied",
    "violation",
    "mmio",
    "internal-error",
    "completed",
    "exception",
    "run-failed",
)
