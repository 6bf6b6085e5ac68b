"""Sub-page protection: switched on, bitmaps, named objects, page access; raw tables and walks."""
