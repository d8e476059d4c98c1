"""What every program of fedhds needs while it runs: durable files, logging, HTTP endpoints, metrics, signals."""
