"""The service itself: capabilities, health, metrics, problems; the binary KVM ABI."""
