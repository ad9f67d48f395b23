"""`capstan smoke`: the whole life of a run in small."""
