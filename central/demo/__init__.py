"""The demo: a whole federation on one machine, driven through the three commands as separate processes."""
