"""Who may do what: tokens, the decision at each route, and the record of what was done."""
