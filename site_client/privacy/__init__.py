"""Patient-level differential privacy: sampling, mechanism, accounting, durable events."""
