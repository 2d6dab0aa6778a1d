"""Backends, and where bytes come from: disk lane, checkpoint index, memory."""
