"""What the hypervisor did about a VM exit.

Up to ``LAST_INTERNAL`` the guest goes on with the same instruction and user space sees nothing.
"""

MAPPED = 0
ARMED = 1
FILLED = 2
RESTORED = 3
LOG_EMPTIED = 4
DIRTY_LOGGED = 5  # a write to a sub-page that was clean: noted, and open from now on
LAST_INTERNAL = DIRTY_LOGGED
VIOLATION = 6
MMIO = 7
INTERNAL_ERROR = 8
COMPLETED = 9
EXCEPTION = 10  # no VM exit: the guest takes an exception of its own
RUN_FAILED = 11  # KVM_RUN itself fails

# Set beside a resolution: a cached translation decided, and the tables would have given another answer.
STALE = 1 << 8

RESOLUTION_NAMES = (
    "mapped",
    "armed",
    "sppt-filled",
    "write-restored",
    "log-emptied",
    "dirty-logged",
    "violation",
    "mmio",
    "internal-error",
    "completed",
    "exception",
    "run-failed",
)
