"""Chat templates: those of a base, of a file and of Capstan, and how each writes a conversation, thinking and tools."""
