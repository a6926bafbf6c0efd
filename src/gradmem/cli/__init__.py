"""The command line, and all else that prints."""
