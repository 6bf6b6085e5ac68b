"""What the hypervisor does: memory slots, fault handling, SPP operations. It handles exits and changes tables."""
