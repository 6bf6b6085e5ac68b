"""Per-page words, sparse: a five-level radix tree by GFN whose nodes are frames.

A tree costs nothing where nothing was said about a page; an absent word is 0. Its root is a word of the state frame.
"""

from engine.cpu.frames import LAYER, STATE_FRAME, new_frame, read_word, write_word
from engine.jit import kernel

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
