"""The virtualization-exception information area (SDM vol. 3C, 26.5.7.2, table 26-1), as 64-bit words.

word 0   31:0 exit reason, 63:32 busy: all ones once filled, a conversion needs 0
word 1   exit qualification
word 2   guest-linear address
word 3   guest-physical address
word 4   15:0 EPTP index; the rest is left as it is
"""

from engine.arch.words import positions, signed

WORD_REASON, WORD_QUALIFICATION, WORD_LINEAR, WORD_PHYSICAL, WORD_EPTP_INDEX = positions(5)

BUSY = signed(0xFFFF_FFFF_0000_0000)
EPTP_INDEX = 0xFFFF
