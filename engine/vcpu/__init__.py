"""A vCPU as KVM keeps it for user space: registers, CPUID, MSRs, and the VMX capabilities that follow from them."""
