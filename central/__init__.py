"""The coordinator. Holds heads and signatures, never an image, never torch."""
