"""The stores of the storage tests."""

from tests.support.store_fixtures import postgres, store_url

__all__ = ["postgres", "store_url"]
