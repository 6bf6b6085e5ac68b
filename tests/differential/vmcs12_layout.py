"""Where the fields of vmcs12 are that the model reads: offset and size in bytes (`vmx/vmcs12.h`)."""

from __future__ import annotations

PAGE = 4096
USED = 998
REVISION = 0x11E5_7ED0
NONE = 0xFFFF_FFFF_FFFF_FFFF

FIELDS = {
    "revision": (0, 4),
    "io_bitmap_a": (40, 8),
    "io_bitmap_b": (48, 8),
    "msr_bitmap": (56, 8),
    "exit_store_addr": (64, 8),
    "exit_load_addr": (72, 8),
    "entry_load_addr": (80, 8),
    "virtual_apic": (96, 8),
    "apic_access": (104, 8),
    "posted_desc": (112, 8),
    "eptp": (120, 8),
    "link": (176, 8),
    "guest_pat": (192, 8),
    "guest_efer": (200, 8),
    "host_pat": (256, 8),
    "host_efer": (264, 8),
    "vmread_bitmap": (280, 8),
    "vmwrite_bitmap": (288, 8),
    "vmfunc": (296, 8),
    "eptp_list": (304, 8),
    "pml": (312, 8),
    "tsc_multiplier": (328, 8),
    "guest_cr0": (424, 8),
    "guest_cr3": (432, 8),
    "guest_cr4": (440, 8),
    "guest_rsp": (536, 8),
    "guest_rip": (544, 8),
    "guest_rflags": (552, 8),
    "host_cr0": (584, 8),
    "host_cr3": (592, 8),
    "host_cr4": (600, 8),
    "host_fs_base": (608, 8),
    "host_gs_base": (616, 8),
    "host_tr_base": (624, 8),
    "host_gdtr_base": (632, 8),
    "host_idtr_base": (640, 8),
    "host_sysenter_esp": (648, 8),
    "host_sysenter_eip": (656, 8),
    "host_rip": (672, 8),
    "pin": (744, 4),
    "proc": (748, 4),
    "cr3_targets": (764, 4),
    "exit": (768, 4),
    "exit_store_count": (772, 4),
    "exit_load_count": (776, 4),
    "entry": (780, 4),
    "entry_load_count": (784, 4),
    "event": (788, 4),
    "event_error": (792, 4),
    "event_length": (796, 4),
    "tpr_threshold": (800, 4),
    "sec": (804, 4),
    "activity": (916, 4),
    "vpid": (960, 2),
    "posted_nv": (962, 2),
    "host_es": (982, 2),
    "host_cs": (984, 2),
    "host_ss": (986, 2),
    "host_ds": (988, 2),
    "host_fs": (990, 2),
    "host_gs": (992, 2),
    "host_tr": (994, 2),
}


class Vmcs12:
    """The 4096 bytes of a vmcs12, and its fields by name."""

    def __init__(self, raw: bytes = b"") -> None:
        self.raw = bytearray(raw.ljust(PAGE, b"\0"))

    def __getitem__(self, name: str) -> int:
        start, size = FIELDS[name]
        return int.from_bytes(self.raw[start : start + size], "little")

    def __setitem__(self, name: str, value: int) -> None:
        start, size = FIELDS[name]
        self.raw[start : start + size] = value.to_bytes(size, "little")

    def has2(self, control: int) -> bool:
        """A secondary control that is active."""
        return bool(self["proc"] >> 31 and self["sec"] & control)

    @property
    def shadows(self) -> bool:
        """VMCS shadowing with a link pointer."""
        return self.has2(0x4000) and self["link"] != NONE
