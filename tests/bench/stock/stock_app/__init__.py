"""The stock side of the comparison of rounds."""
