"""What the manuals define, and nothing else: layouts, numbers, words."""
