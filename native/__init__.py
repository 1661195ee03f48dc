"""What is written in C: compiled by the system's compiler when first needed, kept in the user's cache, called by ctypes."""
