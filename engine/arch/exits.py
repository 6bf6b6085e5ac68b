"""VM-exit reasons and qualifications that memory accesses cause (SDM vol. 3C, 28.2.1, table 28-7)."""

NONE = 0
EPT_VIOLATION = 48
EPT_MISCONFIGURATION = 49
PML_FULL = 62
SPP_EVENT = 66

NAMES = {
    EPT_VIOLATION: "EPT violation",
    EPT_MISCONFIGURATION: "EPT misconfiguration",
    PML_FULL: "page-modification log full",
    SPP_EVENT: "SPP-related event",
}

# Name in the record of an access that caused no exit.
NO_EXIT = "no exit"

# EPT violation
Q_READ = 1 << 0
Q_WRITE = 1 << 1
Q_FETCH = 1 << 2
Q_RIGHTS_SHIFT = 3  # 5:3 = AND of read, write, execute over all entries used
Q_USER_EXECUTE = 1 << 6
Q_LINEAR_VALID = 1 << 7
Q_FINAL = 1 << 8  # the access was to the final translation, not to a guest paging structure
Q_LINEAR_USER = 1 << 9
Q_LINEAR_WRITABLE = 1 << 10
Q_LINEAR_EXECUTE_DISABLE = 1 << 11
Q_NMI_UNBLOCKING = 1 << 12
Q_SHADOW_STACK = 1 << 13
Q_SUPERVISOR_SHADOW_STACK = 1 << 14
Q_PAGING_VERIFICATION = 1 << 15
Q_ASYNCHRONOUS = 1 << 16

# SPP-related event: the bit tells a miss from a misconfiguration
Q_SPP_MISS = 1 << 11


def name_of(reason: int) -> str:
    """Name of an exit reason; its number where it has none."""
    return NO_EXIT if reason == NONE else NAMES.get(reason, str(reason))
