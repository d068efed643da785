"""Serving a session to many clients at once."""
