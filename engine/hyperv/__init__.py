"""Hyper-V's virtual TLB as its guests flush it: hypercalls, their execution, and direct flushes for nested guests.

caller            registers of whoever executes VMCALL, and what they say
privileges        what its CPUID and its guest OS id let it do
kvm_rules         which flush a call asks for, as KVM reads it
tlfs_rules        the same by the letter of the specification
flush_or_refusal  what both come to
flush_ranges      what the words of a list cover
flush_execution   carrying a flush out: exactly, as KVM queues it, or by dropping everything
tlb_locks         which flushes wait, and for whom
queues            KVM's queue of ranges for each processor
l2_hypercalls     whether the lower hypervisor serves the flush of a nested guest, and what the one above sees of it
kvm_on_hyperv     KVM as the guest of Hyper-V: asking it to serve the flushes of KVM's own guests
notes             what KVM keeps about a vCPU
"""
