"""Attacks by strangers, tenants and bad clients, each on a real server process and bounded to seconds."""
