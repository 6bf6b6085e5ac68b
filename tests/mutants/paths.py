"""The tests that the lists name, by short names."""

from __future__ import annotations

CPU = "tests/engine/cpu"
KVM = "tests/engine/kvm"
TRACE = "tests/engine/trace"
DERIVED = f"{CPU}/test_vectors_derived.py"
ENTRY = f"{CPU}/test_vectors_entry.py"
CACHED = f"{CPU}/test_vectors_cached.py"
ACCESS_CHECK = f"{CPU}/test_access_check.py"
GUEST_PAGING = f"{CPU}/test_guest_paging.py"
LOG = f"{CPU}/test_log_and_exceptions.py"
WORDS = f"{CPU}/test_sppt_words.py"
FASTPATH = f"{CPU}/test_fastpath.py"
FRAMES = f"{CPU}/test_frames.py"
FAULT = f"{KVM}/test_fault_handling.py"
DIRTY = f"{KVM}/test_dirty_log.py"
PAGE_TRACKING = f"{KVM}/test_page_tracking.py"
PAGE_ACCESS = f"{KVM}/test_page_access_leaves.py"
MAPPING = f"{KVM}/test_mapping.py"
HOST_MEMORY = f"{KVM}/test_host_memory_events.py"
EMULATOR = f"{KVM}/test_emulator.py"
PROFILES = f"{KVM}/test_profiles.py"
LAYERS = f"{KVM}/test_bitmaps.py"
SPPT = f"{KVM}/test_sppt_tables.py"
SLOTS = f"{KVM}/test_slots.py"
COLUMNAR = f"{TRACE}/test_column_runs.py"
REPLAY = f"{TRACE}/test_replay.py"
INTERACTIVE = f"{TRACE}/test_interactive.py"
INTERACTIVE_TIMED = f"{TRACE}/test_interactive_timed.py"
OBJECTS = f"{TRACE}/test_object_hits.py"
STORE = "tests/engine/state/test_frame_store.py"
KINDS = "tests/engine/machine/test_kinds_of_access.py"
COLUMNS = f"{TRACE}/test_readers_columns.py"
TOOL_LINES = f"{TRACE}/test_tool_lines.py"
LINE_PATTERNS = f"{TRACE}/test_line_patterns.py"
RAW_TABLES = "tests/engine/machine/test_raw_tables.py"
PROCESSOR = "tests/property/test_processor_properties.py"
HYPERV = "tests/engine/hyperv"
MACHINE = "tests/engine/machine"
FOOTPRINTS = "tests/engine/footprint"
SPACES = f"{MACHINE}/test_address_spaces.py"


def plain(*rows: str) -> tuple[str, ...]:
    """Rows of the printed vectors A to F."""
    return tuple(f"{CPU}/test_vectors_translation.py::test_plain[{row}-plain-no-cache]" for row in rows)


def full(*rows: str) -> tuple[str, ...]:
    """Rows of the printed vectors M and N."""
    return tuple(f"{CPU}/test_vectors_translation.py::test_full[{row}]" for row in rows)


def named(path: str, *names: str) -> tuple[str, ...]:
    """Test functions of a file."""
    return tuple(f"{path}::test_{name}" for name in names)
