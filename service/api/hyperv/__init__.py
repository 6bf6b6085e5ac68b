"""Hyper-V: hypercalls, flush queues, the pages that hypervisors share."""
