"""Privacy of what a site releases: mechanisms (pure functions) and the site's durable ledger."""
