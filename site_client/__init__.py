"""The hospital. MRI enters here and stops here."""
