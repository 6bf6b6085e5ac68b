"""Live introspection: a tool that is asked about every write to what it guards, and changes the machine while it is.

The guest is a driver that keeps patching a table. The tool lets it patch the entries it owns (`allow`), refuses others
(`skip`), opens a scratch area the first time that it is written (a change of the bitmap, then `retry`) and trusts one
object for good (`grant`).

Run: `.venv/bin/python examples/live_introspection.py [URL]`; without a URL it starts a service of its own.
"""

import sys
from collections import Counter

from connect import connect, guest

import subpage

TABLE, SCRATCH, TRUSTED = 0x2000, 0x3000, 0x4000
OWNED = range(TABLE, TABLE + 0x80)

OBJECTS = [
    {"name": "table", "gpa": TABLE, "size": 256},
    {"name": "trusted", "gpa": TRUSTED, "size": 128},
]
WRITES = [TABLE, TABLE + 0x80, SCRATCH, SCRATCH + 8, TRUSTED, TRUSTED + 8, TABLE + 8, TABLE + 0x88]


def main(url: str | None) -> None:
    said: Counter[str] = Counter()
    with connect(url) as client, guest(client) as vm:
        vm.protect(OBJECTS, name="driver")
        vm.set_subpages(SCRATCH >> 12, 0)

        def decide(question: subpage.Question) -> str:
            action = answer(question)
            said[action] += 1
            return action

        def answer(question: subpage.Question) -> str:
            if question.objects == ["trusted"]:
                return "grant"
            if question.objects == ["table"]:
                return "allow" if question.gpa in OWNED else "skip"
            vm.set_subpages(question.gfn, 0xFFFF_FFFF)
            return "retry"

        with vm.attach(decide, priority=10, default_action="stop"):
            trace = vm.replay(WRITES, on_violation="ask")

    print(f"{said.total()} questions: {', '.join(f'{action} {count}' for action, count in sorted(said.items()))}")
    assert said == {"allow": 2, "skip": 2, "grant": 1, "retry": 1}
    assert (trace.records, trace.violations) == (len(WRITES), said.total())
    assert {name: hit["violations"] for name, hit in trace.by_object.items()} == {"table": 4, "trusted": 1}


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
