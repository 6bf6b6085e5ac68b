"""KVMI: a machine as the hypervisor's end of the socket that introspection tools speak (docs/kvmi.md)."""
