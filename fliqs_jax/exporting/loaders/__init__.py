"""Programs that load what is exported, without this package; each export has its own.

They are copied beside the exported file, run in a new process to check it, and show how
a program of one's own would load it.
"""
