"""A corpus of documents, written into memories by many processes on Ray Data.

`documents` reads a source, `destination` keeps what was written, `writer` is what each process does, `work` is what the
caller runs.
"""
