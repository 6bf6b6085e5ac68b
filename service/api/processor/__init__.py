"""vCPUs: VMCS, translation caches, MSRs, CPUID."""
