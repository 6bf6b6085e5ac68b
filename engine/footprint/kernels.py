"""Counting the places of a trace: one look-up in a hash table for each record, and no allocation.

A table is int64[4 * rows], four words a row, as many rows as a power of two: two words of the key, how often (0 for an
empty row), and the index of the first record. Its key is multiplied by two odd numbers of the caller's choice, so that
nobody who does not know them can make a trace whose places collide.
"""

import numpy as np

from engine.arch import access as acc
from engine.jit import kernel, stands_alone
from engine.trace.record_checks import DONE, describe, refusal_of_place, refusal_of_word

ROW_WORDS = 4
BLOCK_BITS = 3
BLOCK_ROWS = 1 << BLOCK_BITS
NEED_ROOM = 1  # beside DONE and what is wrong with a record

# What an access is, as far as a decision depends on it: access in bits 1:0, then
KIND_SHIFT = 2  # 3 bits
SOURCE_SHIFT = 5  # 2 bits
UNTRANSLATED = 1 << 7  # a paging read without a linear address: it never counts as a write

# Word 1 of a place: how many sub-pages or bytes in bits 15:0, then
WHAT_SHIFT = 16
CONTEXT_SHIFT = 24  # number of its bucket and pc

# Word 1 of a record without the vCPU and the length of the instruction: nothing here depends on them.
BUT_VCPU = ~(0xFFFF << 32)
BUT_VCPU_AND_LENGTH = BUT_VCPU & ~(acc.RECORD_LENGTH_MASK << acc.RECORD_LENGTH_SHIFT)

ADDRESS_BITS = 52
ONE, TWO, THREE = np.uint64(1), np.uint64(2), np.uint64(3)


@kernel
def what_of(word):
    """What the access of a record is (word 1), in 8 bits."""
    how = describe(word)
    kind = (how & acc.KIND_MASK) >> acc.KIND_SHIFT
    source = word >> acc.RECORD_SOURCE_SHIFT & acc.RECORD_SOURCE_MASK
    what = how & acc.ACCESS_MASK | kind << KIND_SHIFT | source << SOURCE_SHIFT
    if kind == acc.PAGING_READ and not how >> acc.LINEAR_SHIFT & acc.LINEAR_VALID:
        what |= UNTRANSLATED
    return what


@kernel
def row_of(table, mix, word0, word1):
    """Offset of the row that has a key, or of the empty one where it would be.

    Neighbours of one kind, which traces access one after the other, lie in one block of rows. ``mix`` is two odd
    multipliers, by how many bits their product is shifted down, and how many low bits of ``word0`` neighbours share.
    """
    odd0, odd1, down, fine = mix
    near = word0 >> fine
    block = ((near >> BLOCK_BITS) * odd0 ^ word1 * odd1) >> down
    mask = np.uint64((table.shape[0] >> 2) - 1)
    row = np.uint64(block << BLOCK_BITS | near & BLOCK_ROWS - 1) & mask
    while True:
        at = row << TWO
        if (table[at] ^ word0) | (table[at | ONE] ^ word1) == 0 or table[at | TWO] == 0:
            return at
        row = (row + ONE) & mask


@kernel
def count_run(words, contexts, start, base, seen, head, what, unit, table, mix, limit, used):
    """Count records with ``head`` above the size in word 1, up to the first other; returns (position, whether full).

    Indices are unsigned: signed ones are looked at whether they count from the end, which costs a third of the time.
    """
    stands_alone()
    count = np.uint64(words.shape[0] >> 1)
    i = np.uint64(start)
    full = False
    while i < count:
        gpa = words[i << ONE]
        more = ((words[i << ONE | ONE] & seen) ^ head) - 1
        if (more >> 16) | (gpa >> ADDRESS_BITS) != 0:
            break
        last = gpa + more
        if last >> ADDRESS_BITS != 0:
            break
        begin = gpa >> unit
        key = ((last >> unit) - begin + 1) | what
        if contexts.shape[0]:
            key |= contexts[i] << CONTEXT_SHIFT
        at = row_of(table, mix, begin, key)
        if table[at | TWO] == 0:
            if used[0] == limit:
                full = True
                break
            used[0] += 1
            table[at] = begin
            table[at | ONE] = key
            table[at | THREE] = base + np.int64(i)
        table[at | TWO] += 1
        i += ONE
    return np.int64(i), full


@kernel
def count_places(words, contexts, start, base, kinds, unit, table, mix, limit, used):
    """Count the places of ``words`` (int64[2n], two a record) from position ``start``; ``base`` is the index of the
    chunk's first record, ``kinds`` as in a chunk, ``contexts`` int64[n] numbers or empty, ``unit`` the level's shift.

    ``used`` int64[1] is how many rows have a place, ``limit`` how many may. Returns (status, position): DONE, NEED_ROOM
    for a larger table, or what is wrong with the record there.
    """
    seen = BUT_VCPU_AND_LENGTH if kinds else BUT_VCPU
    count = words.shape[0] >> 1
    i = start
    while i < count:
        word = words[2 * i + 1]
        bad = refusal_of_word(word, kinds)
        if bad == DONE:
            bad = refusal_of_place(words[2 * i], word & 0xFFFF)
        if bad != DONE:
            return bad, i
        head = word & seen & ~0xFFFF
        what = what_of(word) << WHAT_SHIFT
        i, full = count_run(words, contexts, i, base, seen, head, what, unit, table, mix, limit, used)
        if full:
            return NEED_ROOM, i
    return DONE, i


@kernel
def number_contexts(pcs, buckets, start, numbers, table, mix, limit, used):
    """Give each pair of a pc and a bucket (int64[n] both) a number, from 0 in order of appearance; returns how far."""
    for i in range(start, numbers.shape[0]):
        at = row_of(table, mix, pcs[i], buckets[i])
        if table[at | TWO] == 0:
            if used[0] == limit:
                return i
            used[0] += 1
            table[at] = pcs[i]
            table[at | ONE] = buckets[i]
            table[at | TWO] = used[0]
        numbers[i] = table[at | TWO] - 1
    return numbers.shape[0]


@kernel
def move_rows(table, larger, mix):
    """Copy the rows of a table to a larger one; ``mix`` is that of the larger."""
    for old in range(0, table.shape[0], ROW_WORDS):
        if table[old + 2] != 0:
            new = row_of(larger, mix, table[old], table[old + 1])
            for word in range(ROW_WORDS):
                larger[new | np.uint64(word)] = table[old + word]
