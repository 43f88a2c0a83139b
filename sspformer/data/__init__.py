"""BIDS dataset to volumes to slices; patient-level split; frozen-feature cache."""
