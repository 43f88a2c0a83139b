"""The network: slim head, encoder, decoder, tails, and the presets that assemble them."""
