"""Per-page words, sparse: a five-level radix tree by GFN whose nodes are frames.

A tree costs nothing where nothing was said about a page; an absent word is 0. The layers of sub-page access:

POLICY   bits 31:0 sub-pages that SET denies, bits 63:32 sub-pages that a protection covers
GRANTED  bits 31:0 sub-pages on which a protection was lifted by a grant

effective bit = not denied by SET and (not protected or granted)
"""

from engine.arch.sppt import FULL_ACCESS
from engine.cpu.frames import LAYER, STATE_FRAME, new_frame, read_word, write_word
from engine.jit import kernel
from engine.kvm.registers import ROOT_GRANTED, ROOT_POLICY

TREE_LEVELS = 5
INDEX_BITS = 9
INDEX_MASK = 511


@kernel
def leaf_of(m, root, gfn):
    """Frame of the leaf node that holds the word of ``gfn``, 0 where there is none."""
    node = read_word(m, STATE_FRAME, root)
    level = TREE_LEVELS - 1
    while level > 0 and node != 0:
        node = read_word(m, node, (gfn >> (INDEX_BITS * level)) & INDEX_MASK)
        level -= 1
    return node


@kernel
def read(m, root, gfn):
    """Word of a page in the tree whose root is named by register ``root``."""
    node = leaf_of(m, root, gfn)
    if node == 0:
        return 0
    return read_word(m, node, gfn & INDEX_MASK)


@kernel
def write(m, root, gfn, word):
    """Store the word of a page; takes up to five frames."""
    if word == 0 and read(m, root, gfn) == 0:
        return
    node = read_word(m, STATE_FRAME, root)
    if node == 0:
        node = new_frame(m, LAYER)
        write_word(m, STATE_FRAME, root, node)
    level = TREE_LEVELS - 1
    while level > 0:
        index = (gfn >> (INDEX_BITS * level)) & INDEX_MASK
        child = read_word(m, node, index)
        if child == 0:
            child = new_frame(m, LAYER)
            write_word(m, node, index, child)
        node = child
        level -= 1
    write_word(m, node, gfn & INDEX_MASK, word)


@kernel
def denied_by_set(m, gfn):
    """Sub-pages of a page that SET denies."""
    return read(m, ROOT_POLICY, gfn) & FULL_ACCESS


@kernel
def protected(m, gfn):
    """Sub-pages of a page that a protection covers."""
    return (read(m, ROOT_POLICY, gfn) >> 32) & FULL_ACCESS


@kernel
def granted(m, gfn):
    """Sub-pages of a page on which a grant stands."""
    return read(m, ROOT_GRANTED, gfn) & FULL_ACCESS


@kernel
def effective(m, gfn):
    """Sub-pages of a page that may be written."""
    policy = read(m, ROOT_POLICY, gfn)
    if policy == 0:
        return FULL_ACCESS
    closed = (policy >> 32) & FULL_ACCESS
    if closed:
        closed &= ~granted(m, gfn)
    return ~(policy | closed) & FULL_ACCESS


@kernel
def store_policy(m, gfn, denied, covered):
    """Store both halves of the policy word of a page."""
    write(m, ROOT_POLICY, gfn, (covered << 32) | (denied & FULL_ACCESS))


@kernel
def store_granted(m, gfn, mask):
    """Store the grants of a page."""
    write(m, ROOT_GRANTED, gfn, mask & FULL_ACCESS)
