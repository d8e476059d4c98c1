"""Who is who under mutual TLS: minting certificates, using them, and reading a peer's identity from one."""
