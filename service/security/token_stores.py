"""Which store of tokens the settings mean."""

from __future__ import annotations

from service.security.tokens import FileTokens, TokenStore
from service.settings import Settings
from service.storage.urls import MEMORY, StoreUrl


def tokens_of(settings: Settings) -> TokenStore | None:
    """The file of tokens if there is one, else the store; none where machines live in memory."""
    if settings.token_file is not None:
        return FileTokens(settings.token_file)
    url = StoreUrl.parse(settings.store)
    if url.kind == MEMORY:
        return None
    from service.security.stored_tokens import StoredTokens  # noqa: PLC0415 - in memory the database libraries are not needed

    return StoredTokens(url)
