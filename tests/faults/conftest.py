"""The stores of the storage tests."""

from tests.service.storage.conftest import postgres, store_url

__all__ = ["postgres", "store_url"]
