"""Self-supervised pretraining of the encoder."""
