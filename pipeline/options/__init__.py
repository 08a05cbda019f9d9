"""Options: declared once, checked, and made into the configuration. Starts nothing."""
