"""The coordinator's public port: signed manifest and blob download over gRPC with mutual TLS."""
