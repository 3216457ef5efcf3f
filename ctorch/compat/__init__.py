"""Other libraries' module names over ctorch, for code that migrates."""
