"""The description of a base: its architecture, read off config.json and the model that transformers builds on
`meta`.
"""
