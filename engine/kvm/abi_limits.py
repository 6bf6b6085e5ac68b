"""What the binary ABI of every kernel allows; what differs is ``LimitRows`` of ``engine.state.profiles``."""

from __future__ import annotations

ADDRESS_SPACES = 2  # 0, and 1 for system-management mode
MAX_SLOT_PAGES = (1 << 31) - 1  # KVM_MEM_MAX_NR_PAGES
USER_TOP = (1 << 47) - 0x1000  # TASK_SIZE_MAX with four levels of paging
