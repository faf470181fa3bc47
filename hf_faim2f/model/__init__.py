"""The model code, which is copied into every published repository as remote code. It imports nothing else from here."""
