"""The hypervisor's end without a socket: sessions byte by byte, and what ends a connection."""

from __future__ import annotations

import random
import struct
from typing import Any
from uuid import UUID

import pytest

from service.kvmi.guest import Fault, PageRights, RegisterLoad
from service.kvmi.handshake import Identity, cookie_hash, hello, take_answer
from service.kvmi.wire import Broken
from tests.kvmi import kvmi_messages as kvmi
from tests.service.kvmi.fake_guest import FakeGuest, Wire


def raw(text: str) -> bytes:
    return bytes.fromhex(text.replace("|", " "))


ZEROS = "00 " * 8
V6, V7 = "v6", "v7"


# ---- handshake


def test_hello() -> None:
    identity = Identity(UUID("00112233-4455-6677-8899-aabbccddeeff"), "subpage-vm", 0x6553F100)
    found = hello(identity, 0x2000_0000)
    assert found[:32] == raw("68 00 00 00 | 00112233445566778899aabbccddeeff | 00 00 00 00 | 00 f1 53 65 00 00 00 00")
    assert found[32:96] == b"subpage-vm".ljust(64, b"\0")
    assert found[96:] == struct.pack("<Q", 0x2000_0000)


def test_a_long_name_is_cut_between_characters() -> None:
    name = hello(Identity(UUID(int=1), "ä" * 40, 0), 0)[32:96]
    assert name == ("ä" * 31).encode().ljust(64, b"\0")


@pytest.mark.parametrize("size", [24, 28, 4096])
def test_the_answer_may_be_longer(size: int) -> None:
    buffer = bytearray(struct.pack("<I20x", size).ljust(size, b"\1") + b"rest")
    assert not take_answer(bytearray(buffer[: size - 1]), Identity(UUID(int=1), "", 0))
    assert take_answer(buffer, Identity(UUID(int=1), "", 0)) and buffer == b"rest"


@pytest.mark.parametrize("size", [0, 23, 4097, 0xFFFF_FFFF])
def test_an_answer_of_another_size_ends_it(size: int) -> None:
    with pytest.raises(Broken, match="24 or a few more"):
        take_answer(bytearray(struct.pack("<I", size)), Identity(UUID(int=1), "", 0))


def test_the_cookie_is_compared_where_one_is_configured() -> None:
    identity = Identity(UUID(int=1), "", 0, cookie_hash("secret"))
    assert take_answer(bytearray(struct.pack("<I20s", 24, cookie_hash("secret"))), identity)
    for wrong in (bytes(20), cookie_hash("Secret")):
        with pytest.raises(Broken, match="cookie"):
            take_answer(bytearray(struct.pack("<I20s", 24, wrong)), identity)


# ---- sessions


def test_version_and_features() -> None:
    ask = raw("02 00 00 00 01 00 00 00")
    assert Wire().send(ask) == [
        raw(f"02 00 18 00 01 00 00 00 | {ZEROS} | 01 00 00 00 00 00 00 00 | 01 00 00 00 01 00 00 00")
    ]
    assert Wire(FakeGuest(sub_pages=False)).send(ask)[0][24] == 0
    assert Wire(dialect=V6).send(ask) == [raw(f"02 00 10 00 01 00 00 00 | {ZEROS} | 01 00 00 00 00 00 00 00")]


def test_info_and_pause_of_two_vcpus() -> None:
    wire = Wire()
    assert wire.send(raw("05 00 00 00 02 00 00 00")) == [
        raw(f"05 00 18 00 02 00 00 00 | {ZEROS} | 02 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00")
    ]
    batch = raw(
        f"1b 00 08 00 03 00 00 00 | 00 01 00 00 00 00 00 00"
        f"07 00 10 00 04 00 00 00 | {ZEROS} | 01 00 00 00 00 00 00 00"
        f"07 00 10 00 05 00 00 00 | 01 00 00 00 00 00 00 00 | 01 00 00 00 00 00 00 00"
        f"1b 00 08 00 06 00 00 00 | 01 01 00 00 00 00 00 00"
    )
    first, second, last = wire.send(batch)
    assert first[:24] == raw("01 00 20 02 01 00 00 00 | 20 02 00 00 0a 00 00 00 | 08 00 00 00 00 00 00 00")
    assert second[:24] == raw("01 00 20 02 02 00 00 00 | 20 02 01 00 0a 00 00 00 | 08 00 00 00 00 00 00 00")
    assert len(first) == len(second) == 8 + 544
    assert last == raw(f"1b 00 08 00 06 00 00 00 | {ZEROS}")
    assert wire.send(raw("1d 00 00 00 07 00 00 00")) == [
        raw(f"1d 00 10 00 07 00 00 00 | {ZEROS} | 00 00 02 00 00 00 00 00")
    ]
    assert wire.connection.paused
    for seq, vcpu in ((1, 0), (2, 1)):
        assert wire.send(kvmi.frame(0, seq, kvmi.event_reply(vcpu, kvmi.CONTINUE, kvmi.PAUSE))) == []
    assert not wire.connection.paused and wire.closed is None


def test_protecting_a_page_and_enabling_events() -> None:
    wire = Wire()
    for sent, came in (
        (
            "15 00 18 00 08 00 00 00 | 00 00 01 00 00 00 00 00 | 00 10 00 00 00 00 00 00  05 00 00 00 00 00 00 00",
            f"15 00 08 00 08 00 00 00 | {ZEROS}",
        ),
        (f"09 00 10 00 1e 00 00 00 | {ZEROS} | 06 00 01 00 00 00 00 00", f"09 00 08 00 1e 00 00 00 | {ZEROS}"),
        (f"0a 00 10 00 1f 00 00 00 | {ZEROS} | 01 00 00 00 03 00 00 00", f"0a 00 08 00 1f 00 00 00 | {ZEROS}"),
        (f"0b 00 10 00 21 00 00 00 | {ZEROS} | 01 00 00 00 81 00 00 c0", f"0b 00 08 00 21 00 00 00 | {ZEROS}"),
    ):
        assert wire.send(raw(sent)) == [raw(came)]
    assert wire.guest.pages == {1: PageRights(5, 0)}
    assert wire.connection.wants(kvmi.PF, 0) and not wire.connection.wants(kvmi.PF, 1)


def fault(vcpu: int = 0, gpa: int = 0x1008, token: Any = "q", **members: Any) -> Fault:
    return Fault(vcpu, gpa, 8, 2, gva=0xFFFF_8880_0000_1008, token=token, **members)


def test_pf_and_retry() -> None:
    wire = Wire()
    wire.connection.ask(fault())
    [event] = wire.turn()
    assert event[:16] == raw("01 00 38 02 01 00 00 00 | 20 02 00 00 06 00 00 00")
    assert event[8 + 544 :] == raw("08 10 00 00 80 88 ff ff  08 10 00 00 00 00 00 00  02 00 00 00 00 00 00 00")
    lifted = raw("15 00 18 00 27 00 00 00 | 00 00 01 00 00 00 00 00 | 08 10 00 00 00 00 00 00  07 00 00 00 00 00 00 00")
    assert wire.send(lifted) == [raw(f"15 00 08 00 27 00 00 00 | {ZEROS}")]
    assert wire.guest.pages[1].rights == 7
    assert wire.send(raw(f"00 00 20 01 01 00 00 00 | {ZEROS} | 01 06 00 00 00 00 00 00") + bytes(272)) == []
    assert wire.answers == [("q", "retry")]


def test_pf_and_continue_with_a_step() -> None:
    """What mem-event-example of LibVMI does: lift, step, restrict again."""
    wire = Wire()
    wire.call("CONTROL_EVENTS", kvmi.vcpu(0) + kvmi.switch(kvmi.SINGLESTEP, True))
    wire.connection.ask(fault())
    wire.turn()
    wire.call("SET_PAGE_ACCESS", kvmi.access_list((0x1000, 7)))
    assert wire.send(raw(f"3f 00 10 00 16 00 00 00 | {ZEROS} | 01 00 00 00 00 00 00 00")) == [
        raw(f"3f 00 08 00 16 00 00 00 | {ZEROS}")
    ]
    [step] = wire.send(raw(f"00 00 20 01 01 00 00 00 | {ZEROS} | 00 06 00 00 00 00 00 00") + bytes(272))
    assert step[:16] == raw("01 00 28 02 02 00 00 00 | 20 02 00 00 0b 00 00 00") and step[-8:] == bytes(8)
    assert wire.answers == []
    wire.call("SET_PAGE_ACCESS", kvmi.access_list((0x1000, 3)))
    wire.call("CONTROL_SINGLESTEP", kvmi.vcpu(0) + bytes(8))
    assert wire.send(raw(f"00 00 10 00 02 00 00 00 | {ZEROS} | 00 0b 00 00 00 00 00 00")) == []
    assert wire.answers == [("q", "allow")]


def test_retry_steps_only_where_the_page_was_opened() -> None:
    wire = Wire()
    wire.guest.pages[1] = PageRights(5, 0)
    wire.call("CONTROL_EVENTS", kvmi.vcpu(0) + kvmi.switch(kvmi.SINGLESTEP, True))
    wire.call("CONTROL_SINGLESTEP", kvmi.vcpu(0) + b"\1" + bytes(7))
    wire.connection.ask(fault())
    wire.turn()
    assert wire.send(kvmi.frame(0, 1, kvmi.event_reply(0, kvmi.RETRY, kvmi.PF))) == []
    assert wire.answers == [("q", "retry")]
    wire.connection.ask(fault())
    wire.turn()
    wire.guest.pages[1] = PageRights(7, 0xFFFF_FFFF)
    [step] = wire.read(wire.send(kvmi.frame(0, 2, kvmi.event_reply(0, kvmi.RETRY, kvmi.PF))))
    assert step.kind == kvmi.SINGLESTEP


def test_v6_steps_by_the_answer() -> None:
    wire = Wire(dialect=V6)
    wire.guest.pages[1] = PageRights(5, 0)
    wire.connection.ask(fault())
    wire.turn()
    own = struct.pack("<QIBBH256x", 0, 0, 1, 0, 0)
    [step] = wire.read(wire.send(kvmi.frame(0, 1, kvmi.event_reply(0, kvmi.RETRY, kvmi.PF, own))))
    assert step.kind == kvmi.SINGLESTEP and len(step.payload) == 544
    wire.send(kvmi.frame(0, 2, kvmi.event_reply(0, kvmi.CONTINUE, kvmi.SINGLESTEP)))
    assert wire.answers == [("q", "allow")]


def test_registers() -> None:
    wire = Wire()
    ask = raw(
        f"0d 00 2c 00 08 00 00 00 | {ZEROS} | 07 00 00 00 00 00 00 00 | 74 01 00 00 75 01 00 00 76 01 00 00"
        "80 00 00 c0 81 00 00 c0 82 00 00 c0 83 00 00 c0"
    )
    [found] = wire.send(ask)
    assert found[:24] == raw(f"0d 00 50 02 08 00 00 00 | {ZEROS} | 08 00 00 00 00 00 00 00")
    assert len(found) == 8 + 592
    assert found[8 + 8 + 464 : 8 + 8 + 472] == raw("07 00 00 00 00 00 00 00")
    assert found[-16:] == struct.pack("<IIQ", 0xC000_0083, 0, 0x83)
    for count, indices in ((8, 7), (1, 0), (482, 482)):
        body = struct.pack("<H6x", count) + bytes(4 * indices)
        assert wire.call("GET_REGISTERS", kvmi.vcpu(0) + body).error == kvmi.EINVAL
    assert len(wire.call("GET_REGISTERS", kvmi.vcpu(0) + struct.pack("<H6x", 481) + bytes(4 * 481)).data) == 472 + 7696


def test_memory() -> None:
    wire = Wire()
    [found] = wire.send(raw("11 00 10 00 11 00 00 00 | 00 00 10 00 00 00 00 00 | 00 10 00 00 00 00 00 00"))
    assert found[:16] == raw(f"11 00 08 10 11 00 00 00 | {ZEROS}") and len(found) == 8 + 0x1008
    for gpa, size, error in (
        (0x1000, 0, kvmi.EINVAL),
        (0x1001, 4096, kvmi.EINVAL),
        (0, 1 << 63, kvmi.EINVAL),
        (0x1FFF_F000, 4096, 0),
        (0x2000_0000, 1, kvmi.ENOENT),
        ((1 << 64) - 1, 1, kvmi.ENOENT),
    ):
        assert wire.call("READ_PHYSICAL", kvmi.span(gpa, size)).error == error
        body = kvmi.span(gpa, size) + bytes(min(size, 4096))
        if size <= 4096:
            assert wire.call("WRITE_PHYSICAL", body).error == error
    assert wire.guest.written == [(0x1FFF_F000, bytes(4096))]
    wire.send(kvmi.frame(18, 1, kvmi.span(0, 8) + b"short"))
    assert wire.closed is not None


def test_a_query_that_comes_alone_is_answered_as_all_are() -> None:
    """And left alone where it is not alone, not whole, not one, or not answered well."""
    for name, body in (("READ_PHYSICAL", kvmi.span(0x1100, 64)), ("GET_MAX_GFN", b""), ("GET_GUEST_INFO", b"")):
        sent = kvmi.frame(kvmi.IDS[name], 7, body)
        wire = Wire()
        assert [wire.connection.at_once(sent)] == Wire().send(sent) and wire.connection.commands == 1
        for other in (sent[:-1], sent + b"\0", sent * 2, sent[:3], b""):
            assert wire.connection.at_once(other) is None
        wire.connection.receive(sent[:5])
        assert wire.connection.at_once(sent) is None
        wire = Wire()
        wire.send(kvmi.frame(27, 1, kvmi.replies(False, True)))
        assert wire.connection.at_once(sent) is None
        wire.send(kvmi.frame(27, 2, kvmi.replies(False, False)))
        wire = Wire()
        wire.connection.pause(0)
        assert wire.connection.at_once(sent) is None
        [event] = wire.events()
        assert event.kind == kvmi.PAUSE and wire.connection.at_once(sent) is not None
    for id, body in (
        (17, kvmi.span(0x1FFF, 2)),
        (17, kvmi.span(0x2000_0000, 1)),
        (99, b""),
        (27, kvmi.replies(True, True)),
    ):
        assert Wire().connection.at_once(kvmi.frame(id, 1, body)) is None


@pytest.mark.parametrize(("dialect", "errno"), [(V7, kvmi.ENOSYS), (V6, kvmi.EOPNOTSUPP)])
def test_unknown_and_unserved_commands(dialect: str, errno: int) -> None:
    wire = Wire(dialect=dialect)
    for id in (1, 12, 40, 61, 0x7FFF, 0xFFFF):
        assert wire.read(wire.send(kvmi.frame(id, 7, b"anything"))) == [kvmi.Reply(id, 7, errno, b"")]
    assert wire.call("GET_XSAVE", bytes(16)).error == kvmi.EOPNOTSUPP
    # A command of v12: VM_GET_INFO and its pause.
    assert wire.read(wire.send(kvmi.frame(16, 9, bytes(8))))[0].error == kvmi.EOPNOTSUPP
    assert wire.call("CHECK_COMMAND", struct.pack("<HHI", 26, 0, 0)).error == 0
    assert wire.call("CHECK_COMMAND", struct.pack("<HHI", 16, 0, 0)).error == 1
    assert wire.call("CHECK_COMMAND", struct.pack("<HHI", 99, 0, 0)).error == kvmi.EINVAL
    assert wire.call("CHECK_EVENT", struct.pack("<HHI", 6, 0, 0)).error == 0
    assert wire.call("CHECK_EVENT", struct.pack("<HHI", 13, 0, 0)).error == (0 if dialect == V7 else kvmi.EINVAL)
    assert wire.closed is None


def test_a_linear_address() -> None:
    wire = Wire()
    for gva, gpa in (((1 << 63) + 0x1234, 0x1234), (0x1234, (1 << 64) - 1)):
        assert wire.call("TRANSLATE_GVA", kvmi.vcpu(1) + struct.pack("<Q", gva)).data == struct.pack("<Q", gpa)
    assert wire.call("TRANSLATE_GVA", kvmi.vcpu(2) + bytes(8)).error == kvmi.EINVAL
    assert wire.call("TRANSLATE_GVA", kvmi.vcpu(0)).error == kvmi.EINVAL


def test_bitmaps() -> None:
    wire = Wire()
    ask = raw("1a 00 18 00 28 00 00 00 | 00 00 01 00 00 00 00 00 | 00 00 01 00 00 00 00 00  00 00 ff ff 00 00 00 00")
    assert wire.send(ask) == [raw(f"1a 00 08 00 28 00 00 00 | {ZEROS}")]
    assert wire.guest.pages == {0x10: PageRights(5, 0xFFFF_0000)}
    assert wire.call("GET_PAGE_WRITE_BITMAP", kvmi.gpa_list(0x10000, 0x11000)).data == struct.pack(
        "<2I", 0xFFFF_0000, 0
    )
    # 511 entries fit into a message.
    assert wire.call("SET_PAGE_WRITE_BITMAP", kvmi.bitmap_list(*((n << 12, 0) for n in range(511)))).error == 0
    for body, error in (
        (kvmi.bitmap_list((0, 0), view=1), kvmi.EOPNOTSUPP),
        (kvmi.bitmap_list((0, 0)) + b"\0", kvmi.EINVAL),
        (kvmi.bitmap_list((0, 0))[:-1], kvmi.EINVAL),
        (struct.pack("<HHI", 0, 1, 1) + bytes(16), kvmi.EINVAL),
    ):
        assert wire.call("SET_PAGE_WRITE_BITMAP", body).error == error
    off = Wire(FakeGuest(sub_pages=False))
    assert off.call("SET_PAGE_WRITE_BITMAP", kvmi.bitmap_list((0, 0))).error == kvmi.EOPNOTSUPP
    assert off.call("CONTROL_SPP", b"\1" + bytes(7)).error == kvmi.EOPNOTSUPP
    assert wire.call("CONTROL_SPP", b"\1" + bytes(7)).error == 0
    assert wire.call("CONTROL_SPP", bytes(8)).error == kvmi.EOPNOTSUPP


def test_page_access_of_v6() -> None:
    wire = Wire(dialect=V6)
    assert wire.send(kvmi.frame(20, 1, kvmi.gpa_list(0x1000))) == [raw(f"14 00 09 00 01 00 00 00 | {ZEROS} | 07")]


def test_the_first_error_of_a_batch_is_told_and_all_others_are_applied() -> None:
    wire = Wire()
    pages = ((0x1000, 5), (0x2000, 8), (0x3000, 2), (0x4001, 1))
    assert wire.call("SET_PAGE_ACCESS", kvmi.access_list(*pages)).error == kvmi.EINVAL
    assert {gfn: page.rights for gfn, page in wire.guest.pages.items()} == {1: 5, 4: 1}


# ---- replies off and on


def test_replies_off_and_on() -> None:
    """(enable, now): 0,1 none now nor later; 1,1 this and later; 1,0 none to this; 0,0 this one, then none."""
    wire = Wire()
    wanted = kvmi.frame(3, 1, struct.pack("<HHI", 2, 0, 0))
    assert wire.send(kvmi.frame(27, 1, kvmi.replies(False, True))) == []
    assert wire.send(wanted) == []
    assert wire.send(kvmi.frame(27, 2, kvmi.replies(True, False))) == []
    assert len(wire.send(wanted)) == 1
    assert len(wire.send(kvmi.frame(27, 3, kvmi.replies(False, False)))) == 1
    assert wire.send(wanted) == []
    assert len(wire.send(kvmi.frame(27, 4, kvmi.replies(True, True)))) == 1
    assert len(wire.send(wanted)) == 1


def test_a_batch_that_ends_with_an_event_reply_is_not_answered() -> None:
    wire = Wire()
    wire.connection.pause(0)
    [event] = wire.events()
    regs = event.payload[16 : 16 + 144]
    batch = (
        kvmi.frame(27, 0x17, kvmi.replies(False, True))
        + kvmi.frame(14, 0x18, kvmi.vcpu(0) + regs)
        + kvmi.frame(0, event.seq, kvmi.event_reply(0, kvmi.CONTINUE, kvmi.PAUSE))
        + kvmi.frame(27, 0x19, kvmi.replies(True, False))
    )
    assert wire.send(batch) == []
    assert not wire.connection.paused
    assert wire.call("GET_MAX_GFN").error == 0


@pytest.mark.parametrize("dialect", [V6, V7])
def test_what_answers_with_data_cannot_be_sent_while_replies_are_off(dialect: str) -> None:
    wire = Wire(dialect=dialect)
    wire.send(kvmi.frame(27, 1, kvmi.replies(False, True)) + kvmi.frame(29, 2))
    assert wire.closed is not None
    unknown = Wire(dialect=dialect)
    sent = unknown.send(kvmi.frame(27, 1, kvmi.replies(False, True)) + kvmi.frame(99, 2))
    assert (unknown.closed is None, len(sent)) == ((True, 1) if dialect == V6 else (False, 0))


# ---- one event at a time


def test_a_vcpu_has_one_event_open_and_pause_comes_last() -> None:
    wire = Wire()
    wire.connection.ask(fault(token="a"))
    wire.connection.ask(fault(token="b"))
    wire.connection.pause(0)
    wire.connection.ask(fault(vcpu=1, token="c"))
    first, other = wire.events()
    assert (first.kind, first.vcpu, other.vcpu) == (kvmi.PF, 0, 1)
    [second] = wire.read(wire.send(kvmi.frame(0, first.seq, kvmi.event_reply(0, kvmi.CONTINUE, kvmi.PF))))
    assert second.kind == kvmi.PF
    [last] = wire.read(wire.send(kvmi.frame(0, second.seq, kvmi.event_reply(0, kvmi.CRASH, kvmi.PF))))
    assert last.kind == kvmi.PAUSE
    assert wire.answers == [("a", "allow"), ("b", "stop")]
    assert wire.connection.asked() == ["c"]


def test_a_pause_waits_until_the_guest_rests() -> None:
    wire = Wire(FakeGuest(busy=True))
    assert wire.call("PAUSE_VCPU", kvmi.vcpu(1) + bytes(8)).error == 0
    assert wire.events() == [] and wire.connection.paused
    wire.guest.busy = False
    wire.connection.rested()
    assert [event.kind for event in wire.events()] == [kvmi.PAUSE]


def test_pauses_have_a_bound() -> None:
    wire = Wire(FakeGuest(busy=True))
    asked = [wire.call("PAUSE_VCPU", kvmi.vcpu(0) + bytes(8)).error for _ in range(1002)]
    assert set(asked[:1001]) == {0} and asked[1001] == 16


def test_a_late_answer_is_passed_over() -> None:
    wire = Wire()
    wire.connection.ask(fault(token="a"))
    wire.connection.ask(fault(token="b"))
    [first] = wire.events()
    wire.connection.withdraw("a")
    [second] = wire.events()
    assert wire.send(kvmi.frame(0, first.seq, kvmi.event_reply(0, kvmi.CONTINUE, kvmi.PF))) == []
    wire.send(kvmi.frame(0, second.seq, kvmi.event_reply(0, kvmi.CONTINUE, kvmi.PF)))
    assert wire.answers == [("b", "allow")] and wire.closed is None
    # Double: the vCPU waits for none.
    wire.send(kvmi.frame(0, second.seq, kvmi.event_reply(0, kvmi.CONTINUE, kvmi.PF)))
    assert wire.closed is None


def test_a_step_over_rip_drops_the_access() -> None:
    wire = Wire()
    wire.connection.ask(fault(rip=0x1000, insn_len=4))
    [event] = wire.events()
    assert event.rip == 0x1000
    regs = bytearray(event.payload[16 : 16 + 144])
    for moved, error in ((0x1005, kvmi.EOPNOTSUPP), (0xFFF, kvmi.EOPNOTSUPP), (0x1004, 0)):
        regs[128:136] = moved.to_bytes(8, "little")
        assert wire.call("SET_REGISTERS", kvmi.vcpu(0) + bytes(regs)).error == error
    regs[0] = 1
    assert wire.call("SET_REGISTERS", kvmi.vcpu(0) + bytes(regs)).error == kvmi.EOPNOTSUPP
    wire.send(kvmi.frame(0, 1, kvmi.event_reply(0, kvmi.RETRY, kvmi.PF)))
    assert wire.answers == [("q", "skip")]
    assert wire.call("SET_REGISTERS", kvmi.vcpu(0) + bytes(144)).error == kvmi.EOPNOTSUPP
    assert Wire(dialect=V6).call("SET_REGISTERS", kvmi.vcpu(0) + bytes(144)).error == 0


# ---- what ends a connection, and what does not


@pytest.mark.parametrize(
    "payload",
    [
        kvmi.event_reply(0, 0, kvmi.PF)[:15],
        kvmi.event_reply(0, 0, kvmi.PF, bytes(273)),
        kvmi.event_reply(0, 0, kvmi.PF)[:-1] + b"\1",
        kvmi.event_reply(0, 0, kvmi.PF, struct.pack("<QIBBH256x", 0, 257, 0, 0, 0)),
        kvmi.event_reply(0, 0, kvmi.PF, struct.pack("<QIBBH256x", 0, 0, 1, 0, 0)),
        kvmi.event_reply(0, 0, kvmi.PF, struct.pack("<QIBBH256x", 0, 0, 0, 0, 1)),
        b"\0\0\1\0\0\0\0\0" + bytes(8),
        b"\0",
    ],
)
def test_a_bad_answer_ends_it(payload: bytes) -> None:
    wire = Wire()
    wire.connection.ask(fault())
    wire.turn()
    wire.send(kvmi.frame(0, 1, payload))
    assert wire.closed is not None and wire.connection.asked() == ["q"]


def test_an_answer_to_another_event_ends_it() -> None:
    wire = Wire()
    wire.connection.ask(fault())
    wire.turn()
    wire.send(kvmi.frame(0, 2, kvmi.event_reply(0, 0, kvmi.PF)))
    assert "event 2" in str(wire.closed)


def test_an_answer_for_a_vcpu_that_is_not_there_is_an_error_reply() -> None:
    wire = Wire()
    assert wire.read(wire.send(kvmi.frame(0, 5, kvmi.event_reply(2, 0, kvmi.PF)))) == [
        kvmi.Reply(0, 5, kvmi.EINVAL, b"")
    ]


@pytest.mark.parametrize("size", [8185, 0xFFFF])
def test_a_size_beyond_the_largest_ends_it(size: int) -> None:
    wire = Wire()
    wire.send(struct.pack("<HHI", 2, size, 1))
    assert str(size) in str(wire.closed)


def test_the_largest_size_is_taken() -> None:
    wire = Wire()
    assert wire.read(wire.send(kvmi.frame(2, 1, bytes(8184))))[0].error == kvmi.EINVAL


@pytest.mark.parametrize(
    ("dialect", "id", "payload", "ends"),
    [
        (V7, 9, b"\0\0\1\0\0\0\0\0" + kvmi.switch(6, True), True),
        (V7, 7, b"\0\0\1\0\0\0\0\0" + bytes(8), False),
        (V7, 7, kvmi.vcpu(0) + b"\1" + bytes(6) + b"\1", True),
        (V6, 7, kvmi.vcpu(0) + b"\1" + bytes(6) + b"\1", False),
        (V7, 27, b"\1\1\0\1" + bytes(4), True),
        (V6, 27, b"\1\1\1\0" + bytes(4), True),
        (V7, 9, kvmi.vcpu(2) + kvmi.switch(6, True), False),
        (V7, 9, kvmi.vcpu(0) + kvmi.switch(10, True), False),
        (V7, 9, kvmi.vcpu(0) + kvmi.switch(14, True), False),
        (V6, 9, kvmi.vcpu(0) + kvmi.switch(13, True), False),
        (V7, 8, kvmi.switch(6, True), False),
        (V7, 10, kvmi.vcpu(0) + kvmi.register_switch(2, True), False),
        (V7, 11, kvmi.vcpu(0) + kvmi.register_switch(0x2000, True), False),
        (V7, 32, kvmi.vcpu(0) + struct.pack("<H6x", 1), False),
        (V7, 9, b"", False),
    ],
)
def test_padding_and_places(dialect: str, id: int, payload: bytes, ends: bool) -> None:
    wire = Wire(dialect=dialect)
    sent = wire.read(wire.send(kvmi.frame(id, 1, payload)))
    assert (wire.closed is not None) == ends
    assert sent == [] if ends else sent[0].error in (kvmi.EINVAL, kvmi.EOPNOTSUPP)


def test_events_that_never_come_are_taken() -> None:
    """Tools give up when one is refused."""
    wire = Wire()
    for event in (1, 2, 3, 4, 5, 6, 7, 8, 11, 13):
        assert wire.call("CONTROL_EVENTS", kvmi.vcpu(1) + kvmi.switch(event, True)).error == 0
    for event in (0, 9, 12):
        assert wire.call("CONTROL_VM_EVENTS", kvmi.switch(event, True)).error == 0
    for register in (0, 3, 4):
        assert wire.call("CONTROL_CR", kvmi.vcpu(0) + kvmi.register_switch(register, True)).error == 0
    for msr in (0x174, 0x1FFF, 0xC000_0000, 0xC000_1FFF):
        assert wire.call("CONTROL_MSR", kvmi.vcpu(0) + kvmi.register_switch(msr, True)).error == 0
    assert wire.call("GET_VCPU_INFO", kvmi.vcpu(0)).data == bytes(8)
    assert wire.call("GET_EPT_VIEW", kvmi.vcpu(0)).data == bytes(8)
    assert wire.call("SWITCH_EPT_VIEW", kvmi.vcpu(0) + bytes(8)).error == 0
    assert wire.call("GET_CPUID", kvmi.vcpu(0) + struct.pack("<II", 1, 0)).data == struct.pack("<4I", 1, 2, 3, 4)
    assert wire.call("GET_CPUID", kvmi.vcpu(0) + struct.pack("<II", 7, 0)).error == kvmi.ENOENT


def test_unhook_is_sent_only_to_who_wants_it() -> None:
    wire = Wire()
    assert not wire.connection.unhook()
    wire.call("CONTROL_VM_EVENTS", kvmi.switch(kvmi.UNHOOK, True))
    assert wire.connection.unhook()
    [event] = wire.events()
    assert event.kind == kvmi.UNHOOK and event.payload == raw("20 02 00 00 00 00 00 00") + bytes(536)


def test_a_vcpu_that_comes_is_told_of_where_that_is_wanted() -> None:
    wire = Wire()
    wire.guest.count = 3
    wire.connection.vcpus_came()
    assert wire.events() == []
    wire.call("CONTROL_VM_EVENTS", kvmi.switch(kvmi.CREATE_VCPU, True))
    wire.guest.count = 5
    wire.connection.vcpus_came()
    wire.connection.ask(fault(vcpu=3))
    told = wire.events()
    assert [(event.kind, event.vcpu, event.mode) for event in told] == [(kvmi.CREATE_VCPU, n, 8) for n in (3, 4)]
    answer = kvmi.event_reply(3, kvmi.CONTINUE, kvmi.CREATE_VCPU)
    assert [event.kind for event in wire.read(wire.send(kvmi.frame(0, told[0].seq, answer)))] == [kvmi.PF]


def load(vcpu: int, token: Any) -> RegisterLoad:
    return RegisterLoad(vcpu, 3, 0x1000, 0x2000, token)


def test_loads_of_cr3() -> None:
    """Where CR is enabled and CONTROL_CR says CR3; the answer says what is loaded, 0 if it says nothing."""
    wire = Wire()
    connection = wire.connection
    cr3 = kvmi.register_switch(3, True)
    wire.call("CONTROL_CR", kvmi.vcpu(1) + cr3)
    wire.call("CONTROL_EVENTS", kvmi.vcpu(0) + kvmi.switch(kvmi.CR, True))
    wire.call("CONTROL_CR", kvmi.vcpu(0) + kvmi.register_switch(4, True))
    assert connection.loads == frozenset()
    wire.call("CONTROL_CR", kvmi.vcpu(0) + cr3)
    wire.call("CONTROL_EVENTS", kvmi.vcpu(1) + kvmi.switch(kvmi.CR, True))
    assert connection.loads == {0, 1}
    wire.call("CONTROL_CR", kvmi.vcpu(0) + kvmi.register_switch(3, False))
    assert connection.loads == {1}
    given = ((kvmi.CONTINUE, b"\0\x30" + bytes(6)), (kvmi.CONTINUE, b""), (kvmi.RETRY, bytes(8)), (kvmi.CRASH, b""))
    for token, (action, own) in enumerate(given):
        connection.ask_about(load(1, str(token)))
        [event] = wire.events()
        assert (event.kind, event.vcpu, event.load) == (kvmi.CR, 1, (3, 0x1000, 0x2000))
        assert connection.asked() == [str(token)] and connection.boundless() == []
        wire.send(kvmi.frame(0, event.seq, kvmi.event_reply(1, action, kvmi.CR, own)))
    assert wire.answers == [("0", "allow"), ("1", "allow"), ("2", "skip"), ("3", "stop")]
    assert wire.values == [0x3000, 0, None, None]
    connection.ask_about(load(1, "late"))
    [event] = wire.events()
    connection.withdraw("late")
    assert wire.send(kvmi.frame(0, event.seq, kvmi.event_reply(1, 0, kvmi.CR, bytes(8)))) == [] and wire.closed is None
    connection.ask_about(load(1, "long"))
    [event] = wire.events()
    wire.send(kvmi.frame(0, event.seq, kvmi.event_reply(1, 0, kvmi.CR, bytes(9))))
    assert wire.closed is not None and connection.asked() == ["long"]


def test_an_event_about_no_access_is_given_up() -> None:
    """Whoever has a clock does it: what waits behind it comes then, and its late answer is passed over."""
    wire = Wire()
    wire.connection.ask(fault(vcpu=1, token="a"))
    wire.send(kvmi.frame(kvmi.IDS["PAUSE_VCPU"], 1, kvmi.vcpu(0) + bytes(8)))
    [(index, seq)] = wire.connection.boundless()
    assert index == 0 and wire.connection.boundless() == []
    wire.connection.ask(fault(vcpu=0, token="b"))
    wire.connection.give_up(0, seq + 1)
    wire.connection.give_up(1, seq)
    assert wire.events() == [] and wire.connection.paused
    wire.connection.give_up(0, seq)
    [event] = wire.events()
    assert (event.kind, event.vcpu) == (kvmi.PF, 0) and not wire.connection.paused
    wire.connection.give_up(0, seq)
    assert wire.send(kvmi.frame(0, seq, kvmi.event_reply(0, kvmi.CONTINUE, kvmi.PAUSE))) == []
    wire.send(kvmi.frame(0, event.seq, kvmi.event_reply(0, kvmi.CONTINUE, kvmi.PF)))
    assert wire.answers == [("b", "allow")] and wire.closed is None


def test_messages_may_be_torn_anywhere() -> None:
    """And sequence numbers come in any order."""
    whole = b"".join(kvmi.frame(29, seq) for seq in (7, 3, 0xFFFF_FFFF, 3))
    for size in (1, 3, 7, 9):
        wire = Wire()
        sent = [reply for at in range(0, len(whole), size) for reply in wire.send(whole[at : at + size])]
        assert [reply.seq for reply in wire.read(sent)] == [7, 3, 0xFFFF_FFFF, 3]


def test_ten_thousand_commands_at_once() -> None:
    sent = Wire().send(b"".join(kvmi.frame(29, seq) for seq in range(10_000)))
    assert len(sent) == 10_000


# ---- whatever is sent


def mutated(chance: random.Random) -> bytes:
    """A stream that begins like a tool's."""
    messages = []
    for _ in range(chance.randrange(1, 12)):
        id = chance.choice((*kvmi.IDS.values(), chance.randrange(70), chance.randrange(1 << 16)))
        body = chance.choice(
            (
                kvmi.vcpu(chance.randrange(3)) + kvmi.switch(chance.randrange(16), chance.random() < 0.7),
                kvmi.vcpu(chance.randrange(2)) + bytes(8),
                kvmi.access_list(*((chance.randrange(1 << 40), chance.randrange(10)) for _ in range(3))),
                kvmi.bitmap_list(*((chance.randrange(1 << 40), chance.randrange(1 << 32)) for _ in range(3))),
                kvmi.gpa_list(0x1000, 1 << 63),
                kvmi.span(chance.randrange(1 << 30), chance.randrange(9)) + bytes(8),
                kvmi.event_reply(chance.randrange(3), chance.randrange(4), kvmi.PF),
                kvmi.replies(chance.random() < 0.5, chance.random() < 0.5),
                chance.randbytes(chance.randrange(40)),
            )
        )
        found = bytearray(kvmi.frame(id, chance.randrange(6), body))
        if chance.random() < 0.2:
            found[chance.randrange(len(found))] = chance.randrange(256)
        messages.append(bytes(found))
    return b"".join(messages)


def fuzz(frames: int, seed: int) -> None:
    """Streams of made-up messages: nothing is raised, everything that comes back is well-formed, no event is lost."""
    chance = random.Random(seed)
    served = 0
    while served < frames:
        wire = Wire(dialect=chance.choice((V6, V7)))
        asked: list[int] = []
        for token in range(chance.randrange(4)):
            if chance.random() < 0.3:
                wire.connection.ask_about(load(chance.randrange(2), token))
            else:
                wire.connection.ask(fault(chance.randrange(2), token=token))
            asked.append(token)
        wire.read(wire.turn())
        for _ in range(8):
            stream = mutated(chance)
            cut = chance.randrange(len(stream))
            wire.read(wire.send(stream[:cut]))
            wire.read(wire.send(stream[cut:]))
            if wire.closed is not None:
                break
            for index, seq in wire.connection.boundless():
                if chance.random() < 0.5:
                    wire.connection.give_up(index, seq)
        served += wire.connection.commands + 1
        assert sorted(wire.connection.asked() + [token for token, _ in wire.answers]) == asked


def test_whatever_is_sent() -> None:
    fuzz(3_000, 1)


@pytest.mark.soak
def test_whatever_is_sent_a_million_times() -> None:
    fuzz(1_000_000, 2)
