"""Clients that tools generate from openapi/openapi.json, type-checked, and the main job done with one of them."""

# Of the service that they call.
TOKEN = "sp_client_" + "0" * 43
