"""Exchange with other libraries' files and classes."""
