"""Clients that tools generate from openapi/openapi.json, type-checked, and the main job done with one of them."""
