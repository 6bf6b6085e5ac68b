"""The OpenAPI document: what the routes say, links between calls, the pages that show it."""
