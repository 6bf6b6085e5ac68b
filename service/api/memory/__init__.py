"""Guest memory: slots, contents, dirty pages, what the host does to it."""
