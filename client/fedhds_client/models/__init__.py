"""The language models of a site: loading, fingerprints, and adapters on them."""
