"""Per-page words, sparse: a five-level radix tree by GFN whose nodes are frames.

A tree costs nothing where nothing was said about a page; an absent word is 0. Its root is a word of the state frame.
Nodes in which nothing is left return to the free list.
"""

import numpy as np

from engine.cpu.frames import LAYER, STATE_FRAME, blank, free_frame, new_frame, read_word, write_word
from engine.jit import kernel

TREE_LEVELS = 5
INDEX_BITS = 9
INDEX_MASK = 511


LEAVES = np.int64(0)


@kernel
def node_of(m, root, gfn, height):
    """Frame of the node on the path to ``gfn`` that is ``height`` levels above the leaves, 0 where there is none."""
    node = read_word(m, STATE_FRAME, root)
    level = TREE_LEVELS - 1
    while level > height and node != 0:
        node = read_word(m, node, (gfn >> (INDEX_BITS * level)) & INDEX_MASK)
        level -= 1
    return node


@kernel
def leaf_of(m, root, gfn):
    """Frame of the leaf node that holds the word of ``gfn``, 0 where there is none."""
    return node_of(m, root, gfn, LEAVES)


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
    if word == 0:
        clear(m, root, gfn)
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
def next_leaf(m, root, gfn, end):
    """First page from ``gfn`` on, below ``end``, whose word has a leaf node to be in; ``end`` where there is none.

    What has no nodes is passed over at the level at which it has none, so a sparse tree of any width is soon searched.
    """
    top = read_word(m, STATE_FRAME, root)
    at = gfn
    while at < end and top != 0:
        node = top
        level = TREE_LEVELS - 1
        while level > 0:
            node = read_word(m, node, (at >> (INDEX_BITS * level)) & INDEX_MASK)
            if node == 0:
                break
            level -= 1
        if level == 0:
            return at
        at = ((at >> (INDEX_BITS * level)) + 1) << (INDEX_BITS * level)
    return end


@kernel
def clear(m, root, gfn):
    """Store 0 for a page, and free the nodes on its path that hold nothing any more."""
    node = leaf_of(m, root, gfn)
    if node == 0 or read_word(m, node, gfn & INDEX_MASK) == 0:
        return
    write_word(m, node, gfn & INDEX_MASK, 0)
    height = 1
    while blank(m, node):
        free_frame(m, node)
        if height == TREE_LEVELS:
            write_word(m, STATE_FRAME, root, 0)
            return
        node = node_of(m, root, gfn, height)
        write_word(m, node, (gfn >> (INDEX_BITS * height)) & INDEX_MASK, 0)
        height += 1
