"""The writers of an export: the adapter, the merged model, the model in fewer bits."""
