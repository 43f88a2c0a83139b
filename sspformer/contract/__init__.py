"""What crosses the wall: messages, canonical bytes, signed envelopes, privacy records, error codes. No torch."""
