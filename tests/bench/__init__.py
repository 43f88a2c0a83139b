"""Ratios measured side by side in one run: `make bench`. No assertion on time lives in the tests."""
