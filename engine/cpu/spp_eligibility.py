"""Which writes sub-page permissions decide about (SDM vol. 3C, 29.3.4.1).

Where the manual says too little, this is what happens:

* a page that cannot be read is not eligible (``CAP_SPP_EXECUTE_ONLY`` makes it so);
* user shadow-stack writes are eligible, supervisor ones under EPTP[7] are not.
"""

from engine.arch import access as acc
from engine.arch import ept as bits
from engine.cpu import ept
from engine.cpu.access_rights import is_paging, supervisor_shadow_stack, wants
from engine.cpu.frames import CAP_SPP_EXECUTE_ONLY
from engine.jit import kernel


@kernel
def eligible(m, how, mode, level, rights, leaf):
    """Whether sub-page permissions decide about a write that EPT refused (29.3.4.1).

    Write must be what is missing, at whatever level; the page must be mapped by a 4-KByte PTE with bit 61. Guest
    paging-structure accesses never are, nor supervisor shadow-stack accesses under EPTP[7], nor writes in a
    transactional region or to an enclave.
    """
    wanted = wants(how, mode)
    if not mode & ept.MODE_SPP or not wanted & bits.WRITE or rights & bits.WRITE or how & acc.SPP_EXEMPT:
        return False
    if level != 1 or not leaf & bits.SPP or is_paging(how) or supervisor_shadow_stack(how, mode):
        return False
    if wanted & bits.READ and not rights & bits.READ:
        return False
    return rights & bits.READ != 0 or m.caps[CAP_SPP_EXECUTE_ONLY] != 0
