"""The text of a configuration becomes a tree of settings; and what is wrong with it, in words."""
