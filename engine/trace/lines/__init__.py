"""Lines of text by patterns: the patterns are tables (``patterns``), one kernel reads them (``scan``)."""
