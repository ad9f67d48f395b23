"""Chat templates of a base, of a file and of Capstan, and how each writes conversations, thinking and tools."""
