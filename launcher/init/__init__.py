"""A first configuration: a few answers and settings that fit the machine by the plan, or the file of another tool
(importing/).
"""
